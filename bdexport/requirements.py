"""What bdexport asks of other packages (the lower bounds in ``pyproject.toml``), and what is installed of them.

Read from the packages' metadata, so that nothing has to be imported: what is too old may not be importable.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)[^;]*?>=(?P<least>[\w.]+)")


@dataclass(frozen=True)
class Outdated:
    """An installed package that is older than what bdexport asks for."""

    package: str
    version: str
    least: str

    def __str__(self) -> str:
        return f"{self.package} {self.version} is too old, {self.least} or newer is needed"

    @property
    def remedy(self) -> str:
        """The line that mends it."""
        return f'pip install --upgrade "{self.package}>={self.least}"'


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_of(module: str) -> str:
    """The package that brings a module: ``PIL`` -> ``pillow``; the module's own name where none is installed."""
    return next(iter(importlib.metadata.packages_distributions().get(module, ())), module)


def outdated(package: str) -> Outdated | None:
    """What is wrong with the installed version of a package, None where nothing is.

    Where several extras ask for a package, the lowest of their bounds counts: what is older serves none of them.
    """
    version, bounds = installed_version(package), _bounds().get(_plain(package))
    if version is None or not bounds:
        return None
    least = min(bounds, key=_numbers)
    return Outdated(package, version, least) if _numbers(version) < _numbers(least) else None


def all_outdated() -> list[Outdated]:
    """Every installed package that is older than what bdexport asks for."""
    return [found for package in _bounds() if (found := outdated(package)) is not None]


def _bounds() -> dict[str, list[str]]:
    """The least versions by package, one for each extra that asks for it; empty where bdexport runs uninstalled.

    Tools for working on bdexport do not count: no command needs them.
    """
    try:
        requirements = importlib.metadata.requires("bdexport") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    bounds: dict[str, list[str]] = {}
    for requirement in requirements:
        if not requirement.endswith("extra == 'dev'") and (found := _REQUIREMENT.match(requirement)):
            bounds.setdefault(_plain(found["name"]), []).append(found["least"])
    return bounds


def _plain(package: str) -> str:
    """A package's name as the index compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _numbers(version: str) -> tuple[int, ...]:
    """``2.6.0+cpu`` -> (2, 6, 0): what is behind the release's numbers does not count."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [] if release is None else [int(number) for number in release.group().split(".")]
    while numbers and numbers[-1] == 0:  # 1.18.0 is 1.18
        numbers.pop()
    return tuple(numbers)
