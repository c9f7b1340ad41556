"""ONNX Runtime's CUDA provider as far as it goes without a GPU: finding libraries, naming what cannot be loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bundles import make_bundle
from tiny import tiny_model

import bdexport
from bdexport.backends.onnxruntime import OnnxRuntimeBackend
from bdexport.backends.onnxruntime_cuda import (
    PROVIDER_LIBRARIES,
    _linkers_words,
    _provider_error,
    nvidia_library_folders,
    preload_cuda_libraries,
)
from bdexport.errors import UsageError


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the path with NVIDIA's packages in the layout of their wheels, behind another one without any."""
    for name in ("cu13/lib", "cudnn/lib", "cu13/include"):
        (tmp_path / "site" / "nvidia" / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path / "empty"))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    return tmp_path / "site" / "nvidia"


def test_libraries_are_found_in_any_folder_of_the_path(packages: Path) -> None:
    """Oracle: the layout of NVIDIA's wheels."""
    folders = nvidia_library_folders()
    assert [folder for folder in folders if folder.is_relative_to(packages)] == [
        packages / "cu13" / "lib",
        packages / "cudnn" / "lib",
    ]


def test_onnxruntime_is_told_where_they_are(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: its own function is called with each folder, then without one; what that prints is kept from stdout."""
    asked: list[str | None] = []

    def preload(directory: str | None = None) -> None:
        asked.append(directory)
        print("Failed to load libcublas.so.13")

    preload_cuda_libraries(SimpleNamespace(preload_dlls=preload))
    assert asked[-1] is None
    assert {str(packages / "cu13" / "lib"), str(packages / "cudnn" / "lib")} < set(asked)
    assert capsys.readouterr().out == ""
    preload_cuda_libraries(SimpleNamespace())  # an older ONNX Runtime has no such function


def test_a_provider_that_cannot_be_loaded_is_named_in_the_linkers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    """Oracle: what the dynamic linker says of a file that is no library."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    for name in PROVIDER_LIBRARIES:
        (capi / name).write_bytes(b"no library")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(repository)]))
    _linkers_words.cache_clear()
    error = _provider_error("stem")
    _linkers_words.cache_clear()
    assert error is not None
    assert str(error).startswith(
        f"stem [onnxruntime]: the CUDA provider cannot be loaded ({capi}/{PROVIDER_LIBRARIES[0]}"
    )
    assert error.remedy is not None
    assert "cuDNN" in error.remedy


def test_graphs_are_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the error, although opening a session would fail in another way."""

    def open_session(*_: object) -> None:
        raise AssertionError("engines were loaded")

    bundle = make_bundle(tmp_path / "bundle", tiny_model())
    monkeypatch.setattr(OnnxRuntimeBackend, "open", open_session)
    refusals = {
        "cuda": "cannot be captured into a graph from outside, expected chain; pass --executor chain",
        "cpu": "on cpu cannot capture, expected chain or fused; pass --executor chain",
    }
    for device, refusal in refusals.items():
        with pytest.raises(UsageError, match=f"executor 'graph': .*{refusal}"):
            bdexport.load(bundle, device=device, executor="graph")
