"""The commands for a machine with a GPU, on one without: each says in one line what is missing, and does nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdexport.cuda import why_no_cuda


def said(command: list[str], folder: Path) -> list[str]:
    """The lines that the command prints before it fails."""
    # As from a shell, also where `make test` runs this.
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stdout == ""
    return [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]  # make's own last word


@pytest.mark.parametrize("name", ["gpu.py", "gpu_probe.py"])
def test_benchmarks_say_what_is_missing(repository: Path, tmp_path: Path, name: str) -> None:
    """Oracle: the line, with the reason that opening CUDA gives; no result is written."""
    error = why_no_cuda()
    if error is None or torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = tmp_path / "result.json"
    lines = said([sys.executable, f"benchmarks/{name}", "--json", str(result)], repository)
    assert lines == [f"{name}: no GPU can be used, nothing was measured: {error}"]
    assert not result.exists()


def test_the_tests_say_what_is_missing(repository: Path) -> None:
    """Oracle: the line; it comes before anything is installed."""
    if shutil.which("nvidia-smi") is not None or shutil.which("make") is None:
        pytest.skip("this machine has an NVIDIA driver, or no make")
    lines = said(["make", "test-gpu"], repository)
    assert lines == ["test-gpu: no NVIDIA GPU found (nvidia-smi lists none); nothing was tested"]
