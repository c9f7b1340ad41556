"""What the parts of bdexport need from a package index, as lines for pip that work wherever bdexport came from.

bdexport may be a checkout that no index knows, so that ``pip install "bdexport[cpu]"`` fails: the lines name the
packages themselves, with the bounds of pyproject.toml.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

NAME = "bdexport"
CORE = "core"  # stands for what every installation has
_EXTRA = re.compile(r"\s*(?:and\s+)?extra\s*==\s*(['\"])(?P<extra>[^'\"]+)\1")


def install_line(extra: str) -> str:
    """``pip install "onnxruntime>=1.20"``: what the extra of that name, or :data:`CORE`, consists of."""
    found = requirements().get(extra)
    return " ".join(["pip install", *(f'"{one}"' for one in found)]) if found else f'pip install "{NAME}[{extra}]"'


@cache
def requirements() -> dict[str, tuple[str, ...]]:
    """Requirements by extra, as pip takes them; empty where nothing says what they are."""
    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return _of_checkout(Path(__file__).parents[1] / "pyproject.toml")
    found: dict[str, list[str]] = {}
    for line in lines:
        named = _EXTRA.search(line)
        requirement, _, marker = _EXTRA.sub("", line).partition(";")
        marker = marker.strip().replace('"', "'")
        text = f"{requirement.strip()}; {marker}" if marker else requirement.strip()
        found.setdefault(CORE if named is None else named["extra"], []).append(text)
    return {extra: tuple(texts) for extra, texts in found.items()}


def _of_checkout(pyproject: Path) -> dict[str, tuple[str, ...]]:
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return {}
    extras = {CORE: project["dependencies"], **project["optional-dependencies"]}
    return {extra: tuple(text.replace('"', "'") for text in texts) for extra, texts in extras.items()}
