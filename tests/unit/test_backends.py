"""The table of backends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bdexport.backends import BACKENDS, backend_class, get_backend
from bdexport.errors import UsageError
from bdexport.packages import install_line


def test_every_name_leads_to_the_backend_of_that_name() -> None:
    """Oracle: the table's own keys."""
    assert {backend_class(name).name for name in BACKENDS} == set(BACKENDS)


def test_an_unknown_name_lists_the_known_ones() -> None:
    """Oracle: the table's own keys."""
    with pytest.raises(UsageError) as caught:
        get_backend("tensorflow")
    assert all(name in str(caught.value) for name in BACKENDS)


@pytest.mark.parametrize(
    ("module", "backend", "extra"),
    [
        ("onnxruntime", "onnxruntime", "cpu"),
        ("openvino", "openvino", "openvino"),
        ("torch", "torch", "build"),
        ("tensorrt", "tensorrt", "tensorrt"),
        ("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx"),
    ],
)
def test_a_backend_that_is_not_installed_says_how_to_get_it(module: str, backend: str, extra: str) -> None:
    """Oracle: an interpreter in which the package is missing; the name asked for must not be replaced by another."""
    code = f"""
import sys
sys.modules[{module!r}] = None
from bdexport.backends import get_backend
from bdexport.errors import BackendError
from bdexport.packages import install_line
try:
    get_backend({backend!r})
except BackendError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"{module} not installed" in done.stdout.replace("is not", "not")
    assert install_line(extra) in done.stdout
