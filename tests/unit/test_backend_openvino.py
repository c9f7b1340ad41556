"""The OpenVINO backend: what it promises beyond the contract suite: precision by name, engine files, no telemetry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import assert_close, make_bundle, pixels, some_masks, torch_logits, with_engine
from numpy.typing import NDArray
from tiny import SIZE, tiny_checkpoint_file, tiny_model

import bdexport
from bdexport import hardware
from bdexport.backends import openvino, openvino_session
from bdexport.backends.base import BuildOptions
from bdexport.backends.openvino import OpenVinoBackend
from bdexport.backends.openvino_common import KERNEL_CACHE, LEAST_OPENVINO, _Core, import_openvino, no_bf16_reason
from bdexport.backends.openvino_engine import REBUILD, WEIGHTS, XML, read_engine, requirements_here, write_engine
from bdexport.backends.openvino_session import OpenVinoSession, _check_bf16
from bdexport.bundle import Bundle, open_bundle
from bdexport.cli.main import main
from bdexport.errors import BackendError, BuildError, BundleError, UsageError
from bdexport.fused import FusedPath, FusedPaths
from bdexport.parts import mask_to_text

AVAILABLE = OpenVinoBackend().available()
if not AVAILABLE.ok:
    pytest.skip(AVAILABLE.reason, allow_module_level=True)
ROOT = Path(__file__).parents[2]
FUSED_PATHS = 6
needs_bf16 = pytest.mark.skipif(no_bf16_reason() is not None, reason=str(no_bf16_reason()))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("openvino") / "bundle", tiny_model(), "openvino")


@pytest.fixture(scope="module")
def fused_bundle(bundle: Bundle) -> Bundle:
    """Six of the seven masks that drop a block are fused."""
    texts = [mask_to_text(np.array([number & bit for bit in (4, 2, 1)], bool)) for number in range(FUSED_PATHS)]
    fused = FusedPaths("validation", 6, 1.0, tuple(FusedPath(text, 1 / 6) for text in texts))
    return Bundle(bundle.path, replace(bundle.manifest, fused=fused))


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
    assert "bf16 would be emulated here" in last or "cannot compile" in last


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


@pytest.mark.parametrize("damage", ["no zip", "other part", "other shape", "no blob"])
def test_a_damaged_engine_is_named(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    """Oracle: the contract: BackendError with the part and the remedy."""
    broken = Bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")), bundle.manifest)
    engine = broken.engine("block_01")
    if damage == "no zip":
        engine.write_bytes(b"PK nothing")
    elif damage.startswith("other"):
        shutil.copy(broken.engine("block_00"), engine)
        if damage == "other shape":
            _repack(broken.engine("block_00"), engine, {}, {"part": "block_01"})
    else:
        _repack(engine, engine, {"compiled.blob": b"no blob"})
    with pytest.raises(BackendError, match=rf"block_01 \[openvino\]: .*{REBUILD}"):
        opened(broken)


def test_a_model_that_is_none_is_named_when_it_is_needed(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the contract: single images run from the blob, the first batch says what is wrong."""
    broken = Bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")), bundle.manifest)
    _repack(broken.engine("full"), broken.engine("full"), {"model.xml": b"<net>"})
    with closing(opened(broken)) as session:
        session.run("full", np.zeros((1, 3, *SIZE), np.float32))
        with pytest.raises(BackendError, match=rf"full \[openvino\]: cannot load .*model.xml.*{REBUILD}"):
            session.run("full", np.zeros((2, 3, *SIZE), np.float32))


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (b"", "part.json: got empty, expected an object with schema"),
        (b"\xff", "part.json: got byte 0 is not UTF-8"),
        (b"[1]", "part.json: got a list"),
        (b'{"schema": 2}', "part.json: got schema 2, expected"),
        (b'{"schema": "a", "schema": "b"}', 'part.json: got key "schema" occurs twice'),
        ({"schema": "bdexport-openvino-engine/1"}, 'another format: got "bdexport-openvino-engine/1", expected'),
        ({"part": "stem"}, 'another part: got "stem", expected "block_01"'),
        ({"precision": "bf16"}, 'another precision: got "bf16", expected "fp32"'),
        ({"requirements": None}, "part.json: got requirements null, expected"),
    ],
)
def test_a_description_that_does_not_fit_is_named(
    bundle: Bundle, tmp_path: Path, about: bytes | dict[str, Any], words: str
) -> None:
    """Oracle: the contract: what, got, expected and the line that rebuilds, for each field of ``part.json``."""
    broken = Bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")), bundle.manifest)
    engine = broken.engine("block_01")
    _repack(engine, engine, {"part.json": about} if isinstance(about, bytes) else {}, about=about)
    with pytest.raises(BackendError) as caught:
        opened(broken)
    assert str(caught.value).startswith("block_01 [openvino]: ")
    assert words in str(caught.value)
    assert str(caught.value).endswith(REBUILD)


def test_flipped_and_cut_engines_are_refused_in_our_words(bundle: Bundle, tmp_path: Path) -> None:
    """Property: whatever bit is flipped and wherever the file ends, a BackendError in our words, or what was written.

    All headers of the zip and ``part.json``, and some of the rest, which its checksums cover.
    """
    whole = bundle.engine("block_01").read_bytes()
    entry, generator = bundle.manifest.parts["block_01"], np.random.default_rng(0)
    headers = [place for place in range(len(whole)) if place < 400 or place >= len(whole) - 300]
    flips = [*headers, *(int(place) for place in generator.integers(0, len(whole), 100))]
    cases = [whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :] for place in flips]
    cases += [whole[: int(length)] for length in generator.integers(0, len(whole), 30)]
    path, refused = tmp_path / "block_01.openvino", 0
    for data in cases:
        path.write_bytes(data)
        try:
            read = read_engine("block_01", path, entry, "fp32")
        except BackendError as error:
            refused += 1
            text = str(error)
            assert text.startswith("block_01 [openvino]: ")
            assert "expected" in text
            assert text.endswith(REBUILD)
            assert not any(word in text for word in ("codec", "zipfile", "Error", "struct", "b'", "0x"))
        else:  # a date or an attribute, which say nothing
            assert bytes(read.blob.data) in whole
            assert read.requirements.encode() in whole
    assert refused > 0.8 * len(cases)


def opened(bundle: Bundle, threads: int = 1, fused: bool = False) -> OpenVinoSession:
    """A session on the engines as they are: the manifest's hashes are not checked."""
    files = {part: bundle.engine(part) for part in bundle.manifest.parts}
    return OpenVinoSession(bundle.manifest, files, threads, "", fused)


def _repack(source: Path, target: Path, members: dict[str, bytes], about: dict[str, Any] | bytes = b"") -> None:
    """The engine with other members, or with other fields in its ``part.json``."""
    with zipfile.ZipFile(source) as old:
        found = {name: old.read(name) for name in old.namelist()} | members
    if isinstance(about, dict):
        found["part.json"] = json.dumps(json.loads(found["part.json"]) | about).encode()
    with zipfile.ZipFile(target, "w") as new:
        for name, data in found.items():
            new.writestr(name, data)


# ---- loading: imported, or compiled anew -------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_imported_is_compiled(bundle: Bundle, tmp_path: Path, threads: int) -> None:
    """Oracle: the same engines compiled here, because they say that they belong elsewhere: bit for bit, and noted."""
    foreign = Bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")), bundle.manifest)
    for part in bundle.manifest.parts:
        _repack(foreign.engine(part), foreign.engine(part), {}, {"requirements": "ov=1999.1;isa=8087"})
    with closing(opened(bundle, threads)) as here, closing(opened(foreign, threads)) as elsewhere:
        for part, entry in bundle.manifest.parts.items():
            for batch in (1, 3):
                x = np.random.default_rng(batch).random((batch, *entry.input.shape)).astype(np.float32)
                assert np.array_equal(here.run(part, x), elsewhere.run(part, x)), part
        assert not [note for note in here.notes if note.startswith("compiled anew")]
        (note,) = [note for note in elsewhere.notes if note.startswith("compiled anew")]
    count = len(bundle.manifest.parts)
    assert note.startswith(f"compiled anew: {count} engines were compiled for ov=1999.1;isa=8087, and this is ")
    assert "build its engines anew here: bdexport rebuild" in note


def test_another_instruction_set_is_another_requirement(bundle: Bundle) -> None:
    """Oracle: OpenVINO itself, held to SSE4.1 in a process of its own: the bundle opens there, with the note."""
    code = f"import bdexport; print(*bdexport.load({str(bundle.path)!r}).session.notes, sep='\\n')"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "SSE41"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    if requirements_here() in done.stdout.partition("and this is ")[2]:
        pytest.skip("this processor has no more than SSE4.1")
    assert f"were compiled for {requirements_here()}, and this is " in done.stdout


def test_engines_of_another_instruction_set_are_others_to_the_cache() -> None:
    """Oracle: a process held to SSE4.1: what an engine from the cache was compiled for is part of its key."""
    code = "from bdexport.backends.openvino import OpenVinoBackend; print(OpenVinoBackend().versions())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "SSE41"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = str(OpenVinoBackend().versions())
    assert requirements_here() in here
    if requirements_here() in done.stdout:
        pytest.skip("this processor has no more than SSE4.1")
    assert done.stdout.strip() != here


def test_an_openvino_that_is_too_old_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the bound of pyproject.toml."""
    monkeypatch.setattr(openvino, "openvino_version", lambda: "2026.3.9")
    found = OpenVinoBackend().available()
    assert (found.ok, found.reason) == (False, "openvino 2026.3.9 is older than 2026.4")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["openvino"] == [f"openvino>={'.'.join(map(str, LEAST_OPENVINO))}"]


# ---- fused paths: compiled by their first call -------------------------------------------------------------------


def test_fused_paths_are_compiled_once_and_not_at_load(fused_bundle: Bundle) -> None:
    """Oracle: the seconds that the session counts: none at load, some after preparing, no more after that."""
    with closing(opened(fused_bundle, fused=True)) as session:
        assert len(session.fused) == FUSED_PATHS
        assert session.fused_seconds == 0
        session.prepare_fused(4)
        seconds = session.fused_seconds
        assert seconds > 0
        session.prepare_fused(4)
        for path in session.fused:
            for batch in (1, 4):
                session.run_fused(path, np.zeros((batch, 3, *SIZE), np.float32))
        assert session.fused_seconds == seconds


def test_preparing_changes_no_result(fused_bundle: Bundle) -> None:
    """Oracle: the same images through an orchestrator that was not prepared, bit for bit; batches of one and five."""
    masks = some_masks(5, 3)
    with (
        bdexport.load(fused_bundle, executor="fused") as lazy,
        bdexport.load(fused_bundle, executor="fused") as prepared,
    ):
        prepared.prepare(5)
        for rows in (slice(0, 5), *(slice(row, row + 1) for row in range(5))):
            images = pixels(5)[rows]
            expected = lazy(images, masks=masks[rows]).logits
            assert np.array_equal(prepared(images, masks=masks[rows]).logits, expected)
    with pytest.raises(UsageError, match="after close"):
        prepared.prepare()


def test_eight_threads_on_paths_that_are_being_compiled(fused_bundle: Bundle) -> None:
    """Oracle: the same calls one after another in a session of their own; no thread finds a path ready at first."""
    images, masks = pixels(48), some_masks(48, 3)

    def call(loaded: bdexport.runtime.Orchestrator, number: int) -> np.ndarray:
        rows = slice(number % 43, number % 43 + (1 if number % 3 else 5))
        return loaded(images[rows], masks=masks[rows]).logits

    with bdexport.load(fused_bundle, executor="fused") as serial:
        expected = [call(serial, number) for number in range(96)]
    for _ in range(3):
        with bdexport.load(fused_bundle, executor="fused") as loaded, ThreadPoolExecutor(8) as pool:
            preparing = pool.submit(loaded.prepare, 5)
            together = list(pool.map(lambda number: call(loaded, number), range(96)))
            preparing.result()
        for got, wanted in zip(together, expected, strict=True):
            assert_close(got, wanted, 1e-6)


def test_two_threads_are_one_pool(fused_bundle: Bundle) -> None:
    """Oracle: the kernel's count of processor time by thread: whatever number of models ran, two threads computed.

    Every compiled model brings threads of its own, which wait for asynchronous calls that nobody makes.
    """
    code = f"""
import os, numpy, time, bdexport
def ticks():
    found = {{}}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{{task}}/stat") as file:
            found[task] = sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    return found
loaded = bdexport.load({str(fused_bundle.path)!r}, executor="fused", threads=2)
image = numpy.zeros((64, *loaded.manifest.preprocess.size, 3), numpy.uint8)
masks = [[[bool(number & bit) for bit in (4, 2, 1)]] * 64 for number in range(8)]
for mask in masks:
    loaded(image, masks=mask)
before, until = ticks(), time.process_time() + 2
while time.process_time() < until:
    for mask in masks:
        loaded(image, masks=mask)
spent = [count - before.get(task, 0) for task, count in ticks().items()]
print(len(spent), sum(count > sum(spent) / 50 for count in spent), sum(spent))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    threads, computing, ticks = map(int, done.stdout.split())
    assert ticks > 100
    assert threads > 10
    assert computing <= 2


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


def test_a_large_batch_is_computed_in_pieces(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the sizes that OpenVINO is given, which are what its memory grows with, and the outputs in one piece."""
    inputs = bundle.manifest.preprocess(pixels(23))
    with closing(opened(bundle, 1)) as session:
        whole = session.run("full", inputs)
        given: list[int] = []
        infer = openvino_session._Engine._infer

        def noted(self: Any, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
            given.append(len(x))
            infer(self, x, y)

        monkeypatch.setattr(openvino_session._Engine, "_infer", noted)
        monkeypatch.setattr(openvino_session, "LARGEST_CALL", 6)
        pieces = session.run("full", inputs)
    assert (sum(given), max(given)) == (23, 6)
    assert_close(pieces, whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_that_takes_too_long_is_ended(bundle: Bundle, threads: int) -> None:
    """Oracle: the error; afterwards the same logits as before, also of batches, which are compiled anew."""
    images = np.random.default_rng(0).standard_normal((6000, 3, *bundle.manifest.preprocess.size), np.float32)
    with bdexport.load(bundle, threads=threads, timeout_s=0.05) as orchestrator:
        session = orchestrator.session
        some = [session.run("full", images[:size]) for size in (1, 5)]  # without a limit: they are compiled here
        with pytest.raises(BackendError, match=r"full \[openvino\]: was ended.*timeout_s=0\.05"):
            orchestrator.full(images)
        for size, expected in zip((1, 5), some, strict=True):
            assert_close(session.run("full", images[:size]), expected)


def test_a_loop_is_refused_when_a_bundle_is_opened(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the error with the operator, for what is compiled and for the model itself, hashes that fit or not."""
    openvino = import_openvino()
    operations, shape = openvino.opset13, bundle.manifest.parts["block_00"].input.shape
    x, inside = (operations.parameter([-1, *shape], np.float32) for _ in range(2))
    go_on, y = operations.constant(np.array(True)), operations.add(inside, inside)
    loop = operations.loop(operations.constant(np.int64(2**62)), operations.constant(np.array(True)))
    loop.set_function(openvino.Model([go_on.output(0), y.output(0)], [inside], "body"))
    loop.set_special_body_ports([-1, 0])
    loop.set_merged_input(inside, x.output(0), y.output(0))
    model = openvino.Model([loop.get_iter_value(y.output(0), -1)], [x], "loop")
    openvino.serialize(model, str(tmp_path / XML), str(tmp_path / WEIGHTS))
    members = {name: (tmp_path / name).read_bytes() for name in (XML, WEIGHTS)}
    write_engine("block_00", tmp_path / "engine", model, "fp32", members)
    copy = with_engine(bundle, tmp_path / "copy", "block_00", (tmp_path / "engine").read_bytes())
    with pytest.raises(
        BundleError, match=r"block_00 \[openvino\].*compiled.blob holds control flow: got TensorIterator"
    ):
        bdexport.load(copy)
    file = read_engine("block_00", tmp_path / "engine", bundle.manifest.parts["block_00"], "fp32")
    with pytest.raises(BundleError, match=r"model.xml holds control flow: got Loop"):
        file.source()


@pytest.mark.parametrize("before", [None, "7"])
def test_a_variable_that_others_read_is_left_as_it_was(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the environment; torch's oneDNN reads the same variable when it makes its first kernel."""
    monkeypatch.delenv(KERNEL_CACHE, raising=False)
    if before is not None:
        monkeypatch.setenv(KERNEL_CACHE, before)
    _Core()
    assert os.environ.get(KERNEL_CACHE) == before
