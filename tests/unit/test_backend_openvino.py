"""The OpenVINO backend: what it promises beyond the contract suite: precision by name, engine files, no telemetry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bundles import assert_close, make_bundle, pixels, torch_logits
from tiny import tiny_checkpoint_file, tiny_model

import bdexport
from bdexport import hardware
from bdexport.backends.base import BuildOptions
from bdexport.backends.openvino import OpenVinoBackend
from bdexport.backends.openvino_common import no_bf16_reason
from bdexport.backends.openvino_session import OpenVinoSession, _check_bf16
from bdexport.bundle import Bundle, open_bundle
from bdexport.cli.main import main
from bdexport.errors import BackendError, BuildError

AVAILABLE = OpenVinoBackend().available()
if not AVAILABLE.ok:
    pytest.skip(AVAILABLE.reason, allow_module_level=True)
needs_bf16 = pytest.mark.skipif(no_bf16_reason() is not None, reason=str(no_bf16_reason()))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("openvino") / "bundle", tiny_model(), "openvino")


@pytest.fixture(scope="module")
def bf16_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bf16") / "bundle", tiny_model(), "openvino", precision="bf16")


def without_bf16(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A processor as the kernel describes one that has AVX-512 and no BF16."""
    (folder / "cpuinfo").write_text("vendor_id : GenuineIntel\nmodel name : made for the test\nflags : avx2 avx512f\n")
    monkeypatch.setattr(hardware, "PROC", folder)


def test_fp32_is_fp32_where_openvino_would_take_less(bundle: Bundle) -> None:
    """Oracle: torch, nearer than BF16 could come; and the kernels' own precision, as the note has it."""
    images = pixels(5)
    model = tiny_model()
    with bdexport.load(bundle) as orchestrator:
        result = orchestrator(images)
        inputs = orchestrator.manifest.preprocess(images)
        notes = " ".join(orchestrator.session.notes)
    assert_close(result.logits, torch_logits(model, inputs, result.masks))
    assert "precision: fp32" in notes
    assert "bf16" not in notes


@needs_bf16
def test_bf16_is_bf16(bf16_bundle: Bundle) -> None:
    """Oracle: the compiled kernels: every layer that multiplies has a BF16 one; and logits that differ from FP32's."""
    with bdexport.load(bf16_bundle) as orchestrator:
        assert isinstance(orchestrator.session, OpenVinoSession)
        note = next(note for note in orchestrator.session.notes if note.startswith("precision"))
        inputs = orchestrator.manifest.preprocess(pixels(5))
        everything = np.ones((5, 3), bool)
        gap = np.abs(orchestrator(inputs, masks=everything).logits - torch_logits(tiny_model(), inputs, everything))
    ran, _, total = note.partition("in ")[2].partition(" of ")
    assert int(ran) == int(total.split()[0]) > 0
    assert "bf16" in note.partition("(")[2]
    assert gap.max() > 1e-5
    assert bf16_bundle.manifest.precision == "bf16"


def test_bf16_without_units_is_an_error_at_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the contract, on a processor without the flags: the reason and the remedy, nothing left."""
    without_bf16(monkeypatch, tmp_path)
    with pytest.raises(BuildError, match=r"bf16 is not available here.*--precision fp32"):
        make_bundle(tmp_path / "bundle", tiny_model(), "openvino", precision="bf16")
    assert not (tmp_path / "bundle").exists()


@needs_bf16
def test_bf16_without_units_is_an_error_at_load(
    bf16_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the contract, for a bundle that was built where they are."""
    without_bf16(monkeypatch, tmp_path)
    with pytest.raises(BackendError, match=r"bf16 is not available here.*--precision fp32"):
        bdexport.load(bf16_bundle)


@needs_bf16
def test_emulated_bf16_is_refused(bf16_bundle: Bundle) -> None:
    """Oracle: OpenVINO itself, held to AVX2 in a process of its own: it emulates BF16 then, or does not load at all."""
    code = f"import bdexport; bdexport.load({str(bf16_bundle.path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    )
    last = done.stderr.splitlines()[-1]
    assert "BackendError" in last
    assert "bf16 would be emulated here" in last or "cannot load" in last


def test_kernels_that_stand_in_are_named() -> None:
    """Oracle: names of kernels as OpenVINO gives them with and without the units; FP32 layers beside them are fine."""
    _check_bf16("stem", Counter({("bf16", "brgconv_avx512_bf16"): 2, ("f32", "ref_f32"): 1}))
    with pytest.raises(BackendError, match=r"stem \[openvino\]: bf16 would be emulated.*undef_bf16.*fp32"):
        _check_bf16("stem", Counter({("bf16", "undef_bf16"): 2}))


def test_the_command_builds_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit codes, the manifest, and the refusal of a precision that this backend has not."""
    line = ["build", str(tiny_checkpoint_file(tmp_path / "tiny.safetensors")), "--backend", "openvino"]
    assert main([*line, "--out", str(tmp_path / "bundle")]) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.backend, manifest.precision) == ("openvino", "fp32")
    assert manifest.verification is not None
    assert "openvino" in manifest.versions
    assert main([*line, "--out", str(tmp_path / "other"), "--precision", "int3"]) == 2
    assert "fp32 or bf16 or int8" in capsys.readouterr().err


def test_equal_engines_are_equal_files(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the bytes of the bundle's own engines, built again."""
    for part in ("stem", "block_01"):
        OpenVinoBackend().build_part(part, bundle.graph(part), tmp_path / part, BuildOptions())
        assert (tmp_path / part).read_bytes() == bundle.engine(part).read_bytes()


@pytest.mark.parametrize("damage", ["no zip", "other part", "other shape", "no model"])
def test_a_damaged_engine_is_named(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    """Oracle: the contract: BackendError with the part and the remedy."""
    broken = Bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")), bundle.manifest)
    engine = broken.engine("block_01")
    if damage == "no zip":
        engine.write_bytes(b"PK nothing")
    elif damage.startswith("other"):
        shutil.copy(broken.engine("block_00"), engine)
        if damage == "other shape":
            _repack(broken.engine("block_00"), engine, part="block_01")
    else:
        _repack(engine, tmp_path / "new", xml=b"<net>")
        shutil.copy(tmp_path / "new", engine)
    with pytest.raises(BackendError, match=r"block_01 \[openvino\]"):
        OpenVinoSession(bundle.manifest, {part: broken.engine(part) for part in bundle.manifest.parts}, 1, "")


def _repack(source: Path, target: Path, part: str | None = None, xml: bytes | None = None) -> None:
    with zipfile.ZipFile(source) as old:
        members = {name: old.read(name) for name in old.namelist()}
    if part is not None:
        members["part.json"] = members["part.json"].replace(b"block_00", part.encode())
    if xml is not None:
        members["model.xml"] = xml
    with zipfile.ZipFile(target, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)


def test_telemetry_is_kept_out() -> None:
    """Oracle: sys.modules of a fresh interpreter: neither now nor hidden from who wants it later."""
    code = """
import sys
from bdexport.backends import get_backend
get_backend("openvino")
print(sorted(name for name in sys.modules if name.partition(".")[0] == "openvino_telemetry"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_building_needs_no_onnxruntime(tmp_path: Path) -> None:
    """Oracle: an interpreter in which onnxruntime is missing."""
    graph = make_bundle(tmp_path / "bundle", tiny_model(), "null").graph("block_01")
    code = f"""
import sys
from pathlib import Path
sys.modules["onnxruntime"] = None
from bdexport.backends import get_backend
from bdexport.backends.base import BuildOptions
get_backend("openvino").build_part("block_01", Path({str(graph)!r}), Path({str(tmp_path / "engine")!r}), BuildOptions())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "engine").is_file()


def test_a_graph_that_is_none_is_a_build_error(tmp_path: Path) -> None:
    """Oracle: the contract."""
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(BuildError, match=r"stem \[openvino\]: cannot build"):
        OpenVinoBackend().build_part("stem", tmp_path / "graph.onnx", tmp_path / "engine", BuildOptions())
