"""Engines built anew from a bundle's own graphs, as on a machine with another ONNX Runtime or processor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import assert_close, calibration_images, make_bundle, pixels, some_masks
from manifests import change_manifest
from onnx import numpy_helper
from tiny import tiny_model

import bdexport
from bdexport.backends import get_backend
from bdexport.backends.null import NullBackend
from bdexport.bundle import open_bundle
from bdexport.cli.main import main
from bdexport.errors import BackendError, BundleError, OutputError, VerificationError
from bdexport.packages import CORE, _of_checkout, install_line, requirements
from bdexport.rebuild import rebuild_bundle

BACKENDS = ("onnxruntime", "openvino")


def strange(bundle: Path, **changes: object) -> Path:
    """The bundle at ``bundle`` with another machine's fingerprint or versions in its manifest."""
    versions = changes.pop("versions", {})

    def change(data: dict[str, Any]) -> None:
        data |= changes
        data["versions"] |= versions

    change_manifest(bundle, change)
    return bundle


def other_processor(folder: Path, backend: str, **options: Any) -> Path:
    return strange(make_bundle(folder / "bundle", tiny_model(), backend, **options).path, fingerprint="z80 nchwc4")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rebuilt_engines_answer_as_those_they_replace(tmp_path: Path, backend: str) -> None:
    """Oracle: the bundle as it was built here; its engines are written over, so that only graphs can have been used."""
    bundle = make_bundle(tmp_path / "bundle", tiny_model(), backend)
    masks = some_masks(6, bundle.manifest.num_blocks)
    with bdexport.load(bundle) as orchestrator:
        expected = [orchestrator(pixels(6), masks=masks).logits, orchestrator.full(pixels(6)).logits]
    strange(bundle.path, fingerprint="z80 nchwc4")
    with pytest.raises(BackendError, match=r"another processor.*bdexport rebuild"):
        bdexport.load(bundle.path)
    assert main(["rebuild", str(bundle.path), "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["why"]["got"] == "z80 nchwc4"
    assert result["verification"]["ok"]
    manifest = open_bundle(bundle.path).manifest
    assert manifest.fingerprint == get_backend(backend).fingerprint()
    assert manifest.extra["rebuilt"]["from"]["fingerprint"] == "z80 nchwc4"
    with bdexport.load(bundle.path) as orchestrator:
        assert_close(orchestrator(pixels(6), masks=masks).logits, expected[0])
        assert_close(orchestrator.full(pixels(6)).logits, expected[1])


def test_a_precision_with_scales_is_rebuilt_from_its_own_graphs(tmp_path: Path) -> None:
    """Oracle: the int8 logits of the bundle as it was built, which float32 graphs do not give."""
    model = tiny_model()
    scales = calibration_images(tmp_path)
    bundle = make_bundle(tmp_path / "bundle", model, precision="int8", calibration=scales)
    with bdexport.load(bundle) as orchestrator:
        expected = orchestrator.full(pixels(5)).logits
    strange(bundle.path, versions={"onnxruntime": "1.2.3"})
    made = rebuild_bundle(open_bundle(bundle.path), tmp_path / "new")
    with bdexport.load(made.path) as orchestrator:
        assert_close(orchestrator.full(pixels(5)).logits, expected)


def test_int8_without_its_graphs_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    """Oracle: an int8 bundle of before, which has float32 graphs only: float engines must not pass for it."""
    bundle = make_bundle(tmp_path / "b", tiny_model(), precision="int8", calibration=calibration_images(tmp_path)).path
    change_manifest(bundle, lambda data: [part.pop("source") for part in data["parts"]])
    shutil.rmtree(bundle / "sources")
    strange(bundle, versions={"onnxruntime": "1.2.3"})
    with pytest.raises(BundleError, match=r"no graphs in int8; .*bdexport build .*pip install onnxruntime==1\.2\.3"):
        rebuild_bundle(open_bundle(bundle))


def test_another_version_is_refused_with_the_lines_that_help(tmp_path: Path) -> None:
    """Oracle: both versions, the command, and the exact version to install instead."""
    bundle = make_bundle(tmp_path / "a bundle", tiny_model()).path
    strange(bundle, versions={"onnxruntime": "1.2.3"})
    with pytest.raises(BackendError) as caught:
        bdexport.load(bundle)
    text = str(caught.value)
    for part in ("got 1.2.3", "(here)", f"bdexport rebuild '{bundle}'", "pip install onnxruntime==1.2.3"):
        assert part in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_rebuilding_at_load_leaves_the_bundle_and_keeps_the_result(
    tmp_path: Path, own_cache: Path, backend: str
) -> None:
    """Oracle: the bundle's bytes, on a folder that cannot be written, and the cache: the second load builds nothing."""
    bundle = other_processor(tmp_path, backend)
    before = {file: file.read_bytes() for file in sorted(bundle.rglob("*")) if file.is_file()}
    with bdexport.load(bundle, rebuild=True) as first:
        assert first.notes[0].startswith("rebuilt in ")
        assert own_cache in first.bundle.path.parents
        logits = first(pixels(3)).logits
        times = {file: file.stat().st_mtime_ns for file in first.bundle.path.rglob("*")}
    with bdexport.load(bundle, rebuild=True) as second:
        assert second.notes[0].startswith("rebuilt before")
        assert {file: file.stat().st_mtime_ns for file in second.bundle.path.rglob("*")} == times
        np.testing.assert_array_equal(second(pixels(3)).logits, logits)
    assert {file: file.read_bytes() for file in sorted(bundle.rglob("*")) if file.is_file()} == before


def test_a_damaged_copy_in_the_cache_is_built_again(tmp_path: Path) -> None:
    """Oracle: the contract: the cache may be damaged or deleted at will."""
    bundle = other_processor(tmp_path, "onnxruntime")
    with bdexport.load(bundle, rebuild=True) as first:
        first.bundle.engine("stem").write_bytes(b"")
    with bdexport.load(bundle, rebuild=True) as second:
        assert second.notes[0].startswith("rebuilt in ")


def test_a_bundle_that_fits_is_not_rebuilt(tmp_path: Path, own_cache: Path) -> None:
    """Oracle: the bundle's own path, a note that says so, and an empty cache."""
    bundle = make_bundle(tmp_path / "bundle", tiny_model())
    with bdexport.load(bundle, rebuild=True) as orchestrator:
        assert orchestrator.bundle.path == bundle.path
        assert "not needed" in orchestrator.notes[0]
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (lambda folder: (folder / "bundle").rename(folder / "taken") and (folder / "bundle").mkdir(), BundleError),
        (lambda folder: (folder / "new").mkdir() or (folder / "new" / "x").write_text("x"), OutputError),
    ],
    ids=["no bundle", "the place is taken"],
)
def test_what_cannot_be_rebuilt_leaves_nothing(
    tmp_path: Path, changed: Callable[[Path], object], expected: type[Exception]
) -> None:
    """Oracle: the error's kind, and the folder as it was before."""
    other_processor(tmp_path, "onnxruntime")
    changed(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(expected):
        rebuild_bundle(open_bundle(tmp_path / "bundle"), tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_engines_that_differ_from_the_graphs_are_not_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a builder that negates one block's weights; the old bundle stays."""
    bundle = other_processor(tmp_path, "onnxruntime")
    kind = type(get_backend("onnxruntime"))
    right = kind.build_part

    def wrong(self: Any, part: str, graph: Path, *rest: Any) -> None:
        if part == "block_00":
            model = onnx.load(graph)
            for tensor in model.graph.initializer:
                tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
            graph = tmp_path.with_name("wrong.onnx")
            onnx.save(model, graph)
        right(self, part, graph, *rest)

    monkeypatch.setattr(kind, "build_part", wrong)
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(VerificationError):
        rebuild_bundle(open_bundle(bundle))
    assert (bundle / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_backend_that_builds_from_no_graph_says_so(tmp_path: Path) -> None:
    """Oracle: the error names the way that is left."""
    bundle = make_bundle(tmp_path / "bundle", tiny_model(), NullBackend())
    with pytest.raises(BackendError, match=r"backend null.*bdexport build CHECKPOINT"):
        rebuild_bundle(bundle)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rebuilding_needs_neither_torch_nor_onnx(tmp_path: Path, backend: str) -> None:
    """Oracle: a process whose import system refuses the build half; and protobuf, which onnx brings."""
    bundle = other_processor(tmp_path, backend)
    code = f"""
import sys
for name in ("torch", "onnx", "safetensors", "sklearn", "google.protobuf"):
    sys.modules[name] = None
from bdexport.cli.main import main
sys.exit(main(["rebuild", {str(bundle)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    bdexport.load(bundle).close()


# ---- lines for pip ------------------------------------------------------------------------------------------------


def test_printed_lines_name_packages_that_an_index_has(repository: Path) -> None:
    """Oracle: pyproject.toml: every extra's packages with their bounds, and never bdexport itself."""
    checkout = _of_checkout(repository / "pyproject.toml")
    assert set(requirements()) == set(checkout)
    for extra, wanted in checkout.items():
        line = install_line(extra)
        assert line.startswith('pip install "')
        assert "bdexport" not in line
        names = [text.partition(">")[0].replace("_", "-") for text in wanted]
        assert all(name in line for name in names), line
    assert "numpy" in install_line(CORE)
    assert 'pip install "onnxruntime>=' in install_line("cpu")


def test_no_message_names_an_extra_of_a_package_that_no_index_has(repository: Path) -> None:
    """Oracle: the sources: the one place that makes such lines is ``bdexport.packages``."""
    sources = [*(repository / "bdexport").rglob("*.py"), *(repository / "benchmarks").rglob("*.py")]
    found = [path.name for path in sources if "pip install" in (text := path.read_text()) and "bdexport[" in text]
    assert found == ["packages.py"]
