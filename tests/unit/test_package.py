"""The promises of the package itself: what importing it costs, and what installing it brings."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import bdexport

RUN_TIME_HALF = [
    "bdexport",
    "bdexport.backends",
    "bdexport.backends.null",
    "bdexport.backends.onnxruntime",
    "bdexport.backends.onnxruntime_build",
    "bdexport.backends.openvino",
    "bdexport.bench",
    "bdexport.bundle",
    "bdexport.dataset",
    "bdexport.files",
    "bdexport.parts",
    "bdexport.packages",
    "bdexport.preprocess",
    "bdexport.rebuild",
    "bdexport.runtime",
    "bdexport.tensors",
    "bdexport.zoo",
    "bdexport.cli.console",
    "bdexport.cli.main",
    "bdexport.cli.quickstart",
    "bdexport.cli.train",
    "bdexport.cli.evaluate",
    "bdexport.cli.export",
    "bdexport.cli.build",
    "bdexport.cli.inspect",
    "bdexport.cli.verify",
    "bdexport.cli.rebuild",
    "bdexport.cli.run",
    "bdexport.cli.bench",
    "bdexport.cli.report",
    "bdexport.report.write",
    "bdexport.cli.profile",
    "bdexport.cli.doctor",
    "bdexport.cli.zoo",
]
BUILD_HALF_ONLY = ("torch", "onnx", "safetensors", "sklearn", "scipy", "tensorboard", "matplotlib")

# A finder that refuses, in front of all others: to the code under test the packages are not installed.
WITHOUT = """
import sys, importlib, importlib.abc
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def project(repository: Path) -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    return data


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def test_import_is_light() -> None:
    """Oracle: sys.modules after `import bdexport` in a fresh interpreter."""
    done = python(
        "import bdexport, sys; print(sorted({'torch', 'onnx', 'openvino', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("module", RUN_TIME_HALF)
def test_run_time_half_imports_without_build_half(module: str) -> None:
    """Oracle: the import succeeds with torch, onnx and the rest of [build] refused by the import system."""
    refuse = WITHOUT.format(refused=BUILD_HALF_ONLY)
    done = python(f"{refuse}\nimportlib.import_module({module!r})")
    assert done.returncode == 0, done.stderr


def test_load_is_importable_without_build_half() -> None:
    """Oracle: `bdexport.load` resolves to the run time's function although torch and onnx are refused."""
    done = python(WITHOUT.format(refused=BUILD_HALF_ONLY) + "\nimport bdexport; print(bdexport.load.__module__)")
    assert done.stdout.startswith("bdexport.runtime"), done.stderr


def test_unknown_attribute_is_an_attribute_error() -> None:
    """Oracle: Python's own behaviour of a module."""
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bdexport.nonsense  # noqa: B018 - the access is the test


def test_plain_install_brings_the_run_time_half_only(repository: Path) -> None:
    """Oracle: the list of the design: numpy, typer, rich, pillow."""
    assert names(project(repository)["dependencies"]) == {"numpy", "typer", "rich", "pillow"}


def test_extras(repository: Path) -> None:
    """Oracle: the uses that the README lists, each with the package that makes it work; PyCUDA stands alone."""
    extras = {extra: names(list(found)) for extra, found in project(repository)["optional-dependencies"].items()}
    assert set(extras) == {
        "build",
        "cpu",
        "openvino",
        "report",
        "gpu",
        "pycuda",
        "sign",
        "tensorrt",
        "tensorrt-rtx",
        "dev",
    }
    assert extras["build"] >= {"torch", "onnx", "onnxruntime", "safetensors", "scikit-learn"}
    assert extras["cpu"] == {"onnxruntime"}
    assert extras["openvino"] == {"openvino"}
    assert extras["report"] == {"matplotlib"}
    assert extras["sign"] == {"py-minisign"}
    assert extras["gpu"] == {"onnxruntime-gpu", "cuda-python", "nvidia-cuda-nvrtc"}
    assert extras["tensorrt"] == {"tensorrt", "cuda-python", "nvidia-cuda-nvrtc"}
    assert extras["tensorrt-rtx"] == {"tensorrt-rtx-cu13", "cuda-python", "nvidia-cuda-nvrtc"}
    assert [extra for extra, found in extras.items() if "pycuda" in found] == ["pycuda"]


def test_constraints_pin_what_make_installs(repository: Path) -> None:
    """Oracle: every direct requirement of the Makefile's extras has one exact version, without a local suffix."""
    lines = [line for line in (repository / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {Requirement(line).name.lower(): str(Requirement(line).specifier) for line in lines}
    data = project(repository)
    wanted = names(data["dependencies"])
    for extra in ("build", "cpu", "openvino", "tensorrt-rtx", "report", "sign", "dev"):
        wanted |= names(data["optional-dependencies"][extra])
    for name in wanted:
        assert pinned[name].startswith("=="), name
        assert "+" not in pinned[name], name


def test_installed_command_is_main() -> None:
    """Oracle: the entry point that pip registered."""
    found = [entry.value for entry in entry_points(group="console_scripts") if entry.name == "bdexport"]
    assert found == ["bdexport.__main__:main"]


def test_lower_bounds_are_the_versions_that_tests_run_with(repository: Path) -> None:
    """Oracle: constraints-lowest.txt, which ``make test-lowest`` installs: no bound is lower, none is untried."""
    lines = [
        line for line in (repository / "constraints-lowest.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    lowest = {Requirement(line).name: Version(str(Requirement(line).specifier).removeprefix("==")) for line in lines}
    data = project(repository)
    extras = data["optional-dependencies"]
    for text in (*data["dependencies"], *extras["cpu"], *extras["openvino"]):
        (bound,) = Requirement(text).specifier
        assert (bound.operator, Version(bound.version)) == (">=", lowest[Requirement(text).name]), text
