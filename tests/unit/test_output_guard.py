"""No call gives another call's output: where memory ends, where a library says nothing, and where NaN is the answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import assert_close, make_bundle, pixels, some_masks
from cuda_double import CudaDouble
from device_cases import DeviceCase
from numpy.typing import NDArray
from tiny import tiny_model

import bdexport
from bdexport.backends import output_guard as guard
from bdexport.backends.onnxruntime_session import OnnxRuntimeSession
from bdexport.backends.openvino_session import OpenVinoSession
from bdexport.errors import BackendError
from bdexport.parts import path_parts
from bdexport.runtime import Orchestrator

BACKENDS = ("onnxruntime", "openvino", "torch")
WAIT_S = 120

# What memory is left to a call is the process's size and a little more. Each outcome is a batch's: "right" by the
# answers to its images one by one, "raised", or "wrong".
STARVED = """
import json, resource, sys
import numpy as np
import bdexport
from bdexport.errors import BackendError

def starve(mebibytes):
    size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (1024 * size + int(mebibytes * 2**20), resource.RLIM_INFINITY))

folder, outcomes = sys.argv[1], {}
images = np.random.default_rng(0).standard_normal((128, 3, 24, 32)).astype(np.float32)
orchestrators = {name: bdexport.load(f"{folder}/{name}", threads=1) for name in sys.argv[2:]}
for name, orchestrator in orchestrators.items():
    masks = np.arange(128 * orchestrator.manifest.num_blocks).reshape(128, -1) % 3 > 0
    alone = {
        "full": np.concatenate([orchestrator.full(images[i : i + 1]).logits for i in range(128)]),
        "masks": np.concatenate([orchestrator(images[i : i + 1], masks=masks[i : i + 1]).logits for i in range(128)]),
    }
    seen = outcomes[name] = []
    def call(kind, rows):
        try:
            given = images[rows]
            got = (orchestrator.full(given) if kind == "full" else orchestrator(given, masks=masks[rows])).logits
        except (BackendError, MemoryError) as error:
            seen.append("raised")
            return
        expected = alone[kind][rows]
        seen.append("right" if got.shape == expected.shape and np.allclose(got, expected, atol=1e-4) else "wrong")
    some, others, many = np.arange(8), np.arange(8, 16), np.arange(64)
    too_many = np.arange(8000) % 128
    for kind in alone:
        call(kind, some)
        starve(0.25)
        for rows in (many, others, some, too_many, others):
            call(kind, rows)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for rows in (many, others, some):
            call(kind, rows)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of every backend."""
    place = tmp_path_factory.mktemp("guard")
    model = tiny_model()
    for backend in BACKENDS:
        make_bundle(place / backend, model, backend)
    return place


@pytest.fixture(scope="module")
def starved(folder: Path) -> dict[str, list[str]]:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", STARVED, str(folder), *BACKENDS], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, list[str]] = json.loads(done.stdout)
    return outcomes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_that_finds_no_memory_gives_the_right_rows_or_raises(
    starved: dict[str, list[str]], backend: str
) -> None:
    """Oracle: the images' logits one by one. OpenVINO gave 8 rows for 64 images, then the 8 rows of other images."""
    assert "wrong" not in starved[backend], starved[backend]
    assert "raised" in starved[backend]  # otherwise there was memory enough, and nothing was tried


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])  # torch's oneDNN does not recover
def test_a_session_answers_again_when_there_is_memory(starved: dict[str, list[str]], backend: str) -> None:
    """Oracle: the images' logits one by one, for the last three calls of each kind."""
    outcomes = starved[backend]
    half = len(outcomes) // 2
    assert outcomes[half - 3 : half] + outcomes[-3:] == ["right"] * 6


# ---- a library that says nothing ----------------------------------------------------------------------------------


def nothing(*_arguments: Any, **_named: Any) -> None:
    """A run that reports no error and writes nothing."""


@pytest.mark.parametrize("batch", [1, 5])
def test_openvino_that_writes_nothing_is_noticed(folder: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the error, with batch, shape and remedy, where a run is left out; afterwards, the logits of before."""
    with bdexport.load(folder / "openvino", threads=1, executor="chain") as orchestrator:
        inputs = orchestrator.manifest.preprocess(pixels(batch))
        masks = np.zeros((batch, orchestrator.manifest.num_blocks), bool)

        def logits(part: str) -> NDArray[np.float32]:
            return (orchestrator.full(inputs) if part == "full" else orchestrator(inputs, masks=masks)).logits

        for part in ("stem", "full"):
            before = logits(part)
            assert isinstance(orchestrator.session, OpenVinoSession)
            engine = orchestrator.session._parts[part]
            with monkeypatch.context() as patch:
                patch.setattr(engine, "run_of", lambda _request: nothing)
                engine.made_single = None  # so that single images are bound anew, to a run that does nothing
                with pytest.raises(BackendError, match=rf"{part} \[openvino\]: batch {batch}.*not write.*smaller"):
                    logits(part)
            assert_close(logits(part), before)


def test_onnxruntime_that_writes_nothing_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: as above, for single images, whose output buffers are bound and used again."""
    with bdexport.load(folder / "onnxruntime", threads=1, executor="chain") as orchestrator:
        inputs = orchestrator.manifest.preprocess(pixels(1))
        masks = np.ones((1, orchestrator.manifest.num_blocks), bool)
        orchestrator(inputs, masks=masks), orchestrator.full(inputs)
        session = orchestrator.session
        assert isinstance(session, OnnxRuntimeSession)
        single = session._parts["full"]._single
        assert single is not None
        monkeypatch.setattr(single, "_run", nothing)
        with pytest.raises(BackendError, match=r"full \[onnxruntime\]: batch 1.*did not write"):
            orchestrator.full(inputs)
        assert session._in_turn is not None
        buffers = session._in_turn._thread.buffers
        path = path_parts(masks[0].tolist(), orchestrator.manifest.transitions)
        run, binding, left = buffers._calls[path][1]
        buffers._calls[path][1] = (nothing, binding, left)
        with pytest.raises(BackendError, match=r"chain \[onnxruntime\]: batch 1.*did not write"):
            session.run_path(path, session.put("stem", inputs))
        buffers._calls[path][1] = (run, binding, left)
        assert session.run_path(path, session.put("stem", inputs)).shape == (1, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_another_batch_are_noticed(folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the error of the loop itself, whatever the session: 2 rows are no answer to 5 images."""
    with bdexport.load(folder / backend, threads=1) as orchestrator:
        get = orchestrator.session.get
        monkeypatch.setattr(orchestrator.session, "get", lambda part, tensor: get(part, tensor)[:2])
        with pytest.raises(BackendError, match=r"policy: batch 5.*got 2 rows"):
            orchestrator(pixels(5))
        with pytest.raises(BackendError, match=r"network: batch 5.*got 2 rows"):
            orchestrator.full(pixels(5))
        with pytest.raises(BackendError, match=r"network: batch 5.*got 2 rows"):
            orchestrator(pixels(5), masks=some_masks(5, orchestrator.manifest.num_blocks))


def test_a_library_that_makes_another_shape_is_noticed() -> None:
    """Oracle: the text: got, expected, remedy."""
    with pytest.raises(BackendError, match=r"full \[x\]: batch 5.*got \(2, 3\), expected \(5, 3\); pass smaller"):
        guard.check_rows("full [x]", np.zeros((2, 3), np.float32), 5, (3,))


def test_a_copy_from_a_gpu_that_does_not_come_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the error; the staging memory held the logits of the call before."""
    case = DeviceCase(tmp_path / "bundle")
    cuda = CudaDouble()
    with Orchestrator(case.bundle, case.session(cuda), "chain") as orchestrator:
        orchestrator(pixels(4))
        monkeypatch.setattr(cuda, "copy_to_host", nothing)
        with pytest.raises(BackendError, match=r"full \[.*\]: batch 4.*did not write"):
            orchestrator.full(pixels(4, seed=1))


# ---- NaN that is an answer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])  # torch's outputs are fresh, and not marked
def test_no_part_gives_the_mark(folder: Path, backend: str) -> None:
    """Oracle: no error. The worst that can come in is the mark itself: out comes NaN, or what a part makes of it."""
    with bdexport.load(folder / backend, threads=1) as orchestrator:
        session = orchestrator.session
        for part, entry in orchestrator.manifest.parts.items():
            for batch in (1, 3):
                x = np.full((batch, *entry.input.shape), guard.UNWRITTEN, np.uint32).view(np.float32)
                assert np.isnan(x).all()
                y = session.run(part, x)
                assert y.shape == (batch, *entry.output.shape)
                assert not (y.view(np.uint32) == guard.UNWRITTEN).any(), part


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 3])
def test_nan_that_a_network_computes_is_called_that(
    folder: Path, backend: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the text of the loop, not that of an output that was not written. The head is given NaN by the blocks."""
    with bdexport.load(folder / backend, threads=1, executor="chain") as orchestrator:
        session, entry = orchestrator.session, orchestrator.manifest.parts["head"]
        x = np.full((batch, *entry.input.shape), np.nan, np.float32)
        monkeypatch.setattr(session, "run_path", lambda _parts, _x: session.run("head", x))
        with pytest.raises(BackendError, match="network: logits are not finite"):
            orchestrator(pixels(batch), masks=np.ones((batch, orchestrator.manifest.num_blocks), bool))


def test_marks_are_the_last_value_of_each_row() -> None:
    """Oracle: rows that were written in part count as unwritten; NaN of any other bits does not."""
    y = np.zeros((3, 2, 2), np.float32)
    marks = guard.mark(y)
    y[0], y[1, 0], y[2] = 1, 1, np.nan
    with pytest.raises(BackendError, match=r"batch 3.*got 2 rows, expected float32 \(3, 2, 2\)"):
        guard.check_written("x", marks, y)
    y[1] = np.float32(-np.nan)
    guard.check_written("x", marks, y)
