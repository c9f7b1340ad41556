"""A call that takes too long is ended, and nothing of it is left running; engines that may never end are refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import assert_close, make_bundle, pixels, some_masks, with_engine
from onnx import TensorProto, helper, numpy_helper
from tiny import tiny_model

import bdexport
from bdexport.backends import onnx_wire as wire
from bdexport.backends import onnxruntime_session
from bdexport.backends.base import why_no_limit
from bdexport.backends.null import NullBackend
from bdexport.backends.onnxruntime import OnnxRuntimeBackend
from bdexport.backends.onnxruntime_link import input_name, output_name
from bdexport.backends.time_limit import TimeLimit
from bdexport.backends.torch import TorchBackend
from bdexport.bundle import Bundle
from bdexport.errors import BackendError, BundleError, UsageError

FOR_EVER = 2**62
LIMIT_S = 0.2
HANG_S = 30.0  # generous: without a limit these calls take centuries


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("limit") / "bundle", tiny_model())


def looping(bundle: Bundle, part: str, trips: int) -> onnx.ModelProto:
    """An engine of ``part``, which keeps the shape, with as many trips round an addition."""
    shape: list[str | int | None] = ["N", *bundle.manifest.parts[part].input.shape]
    body = helper.make_graph(
        [helper.make_node("Identity", ["again"], ["go_on"]), helper.make_node("Add", ["a", "a"], ["b"])],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, shape),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, shape),
        ],
    )
    ends = input_name(part), output_name(part)
    graph = helper.make_graph(
        [helper.make_node("Loop", ["trips", "", ends[0]], [ends[1]], body=body)],
        "part",
        [helper.make_tensor_value_info(ends[0], TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(ends[1], TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array(trips, np.int64), "trips")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"bdexport.part": part})
    return model


def test_a_loop_is_refused_when_a_bundle_is_opened(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the error with the operator and the remedy; the engine would run for centuries."""
    data = looping(bundle, "block_00", FOR_EVER).SerializeToString()
    copy = with_engine(bundle, tmp_path / "copy", "block_00", data)
    with pytest.raises(BundleError, match=r"block_00 \[onnxruntime\].*control flow: got Loop.*rebuild the bundle"):
        bdexport.load(copy)


def function_model(bundle: Bundle) -> onnx.ModelProto:
    model = looping(bundle, "block_00", 1)
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("d", "F", ["x"], ["y"], [*model.graph.node], opsets))
    return model


@pytest.mark.parametrize("form", ["first tag", "repeated operator", "function", "graphs"])
def test_control_flow_is_found_however_it_is_written(bundle: Bundle, form: str) -> None:
    """Oracle: models that onnx's parser reads as one with a graph in a node, or with a function."""
    model = looping(bundle, "block_00", 1)
    if form == "function":
        model = function_model(bundle)
    elif form == "repeated operator":  # protobuf takes the last of two, text() the first
        fields = wire.read_fields(model.graph.node[0].SerializeToString())
        node = wire.message([(wire.NODE_OP, b"Relu"), *fields])
        assert onnx.NodeProto.FromString(node).op_type == "Loop"
        model.graph.node[0].ParseFromString(node)
    elif form == "graphs":
        graphs = [model.graph.node[0].attribute[0].g]
        del model.graph.node[0].attribute[:]
        model.graph.node[0].attribute.append(helper.make_attribute("bodies", graphs))
    assert wire.control_flow(model.SerializeToString()) == ("functions" if form == "function" else "Loop")


def test_tags_that_protobuf_cuts_are_refused() -> None:
    """Oracle: ValueError: protobuf would read field 7 where this reader sees another."""
    tag = (1 << 32) | (7 << 3) | 2
    with pytest.raises(ValueError, match="not an ONNX message"):
        wire.read_fields(wire._varint(tag) + b"\x00")


def test_numbers_of_a_fixed_size_are_kept() -> None:
    """Oracle: protobuf's own bytes of an attribute with a float."""
    data = helper.make_attribute("alpha", 0.5).SerializeToString()
    assert wire.message(wire.read_fields(data)) == data


def test_no_engine_and_no_graph_of_ours_has_control_flow(bundle: Bundle) -> None:
    """Oracle: none; a part is a straight line of operators. Otherwise good bundles would be refused."""
    for part in bundle.manifest.parts:
        for file in (bundle.engine(part), bundle.graph(part)):
            assert wire.control_flow(file.read_bytes()) is None


# ---- the limit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_that_never_ends_is_ended(
    bundle: Bundle, tmp_path: Path, threads: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the error with part, limit and remedy; no call is left, and what does not loop answers as before."""
    monkeypatch.setattr(onnxruntime_session, "check_straight", lambda *_: None)
    data = looping(bundle, "block_00", FOR_EVER).SerializeToString()
    copy = with_engine(bundle, tmp_path / "copy", "block_00", data)
    masks = some_masks(batch, bundle.manifest.num_blocks)
    masks[:, 0] = True
    with (
        bdexport.load(bundle, threads=threads) as right,
        bdexport.load(copy, threads=threads, executor="chain", timeout_s=LIMIT_S) as orchestrator,
    ):
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(
                BackendError, match=r"(block_00|chain) \[onnxruntime\]: was ended.*timeout_s=0\.2; pass smaller batches"
            ):
                orchestrator(pixels(batch), masks=masks)
            assert LIMIT_S * 0.9 < time.monotonic() - began < HANG_S
        masks[:, 0] = False
        assert_close(orchestrator(pixels(batch), masks=masks).logits, right(pixels(batch), masks=masks).logits)
        assert not orchestrator.session._limit._calls  # type: ignore[attr-defined]


def test_a_limit_changes_no_answer(bundle: Bundle) -> None:
    """Oracle: the logits without one, bit for bit."""
    masks = some_masks(5, bundle.manifest.num_blocks)
    for threads in (1, 2):
        with (
            bdexport.load(bundle, threads=threads) as without,
            bdexport.load(bundle, threads=threads, timeout_s=60) as limited,
        ):
            for images, forced in ((pixels(5), masks), (pixels(5), None), (pixels(1), masks[:1])):
                assert np.array_equal(without(images, forced).logits, limited(images, forced).logits)
            assert np.array_equal(without.full(pixels(2)).logits, limited.full(pixels(2)).logits)


@pytest.mark.parametrize("wrong", [0, -1, True, "1", float("nan"), float("inf"), 1e9])
def test_a_limit_that_is_none_is_refused(bundle: Bundle, wrong: Any) -> None:
    """Oracle: the text."""
    with pytest.raises(UsageError, match=r"timeout_s: got .*, expected seconds above 0"):
        bdexport.load(bundle, timeout_s=wrong)


def test_a_backend_that_cannot_end_a_run_says_so(tmp_path: Path) -> None:
    """Oracle: the refusal, in place of a limit that does nothing."""
    other = make_bundle(tmp_path / "bundle", tiny_model(), NullBackend())
    with pytest.raises(
        UsageError, match=r"timeout_s: got 1, expected None \(backend null cannot end a run\); leave it"
    ):
        bdexport.load(other, timeout_s=1)
    assert why_no_limit(TorchBackend(), "cpu") == "backend torch cannot end a run"


def test_what_is_queued_on_a_gpu_has_no_limit() -> None:
    """Oracle: the reason, also for a backend that can end runs on the CPU."""
    backend = OnnxRuntimeBackend()
    assert why_no_limit(backend, "cpu") is None
    assert "GPU" in str(why_no_limit(backend, "cuda:0"))


def test_a_call_is_told_to_end_until_it_is_over() -> None:
    """Oracle: a library that hears it the third time only. An error before the time is over keeps its own text."""
    told: list[str] = []
    limit = TimeLimit(0.01, told.append)

    def call() -> None:
        with limit.call():
            with limit.running("stem [x]", "a run"):
                while len(told) < 3:
                    time.sleep(0.001)
            with limit.running("stem [x]", "the next"):
                raise AssertionError("it is not begun")

    with pytest.raises(BackendError, match=r"stem \[x\]: was ended"):
        call()
    with pytest.raises(BackendError, match=r"^stem: no$"), limit.call():
        raise BackendError("stem: no")
    limit.close()


def test_the_watching_thread_ends_with_the_session(bundle: Bundle) -> None:
    """Oracle: this process's threads."""

    def watching() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "bdexport time limit"}

    before = watching()  # of tests that have just ended
    with bdexport.load(bundle, threads=1, timeout_s=1) as orchestrator:
        orchestrator(pixels(1))
        (thread,) = watching() - before
    thread.join(HANG_S)
    assert not thread.is_alive()


FORKED = """
import os, sys, time, warnings
from bdexport.backends.time_limit import TimeLimit
from bdexport.errors import BackendError
warnings.simplefilter("ignore")
told = []
limit = TimeLimit(0.02, told.append)
with limit.call():
    pass
child = os.fork()
if child == 0:
    try:
        with limit.call("a run"):
            while not told:
                time.sleep(0.001)
            raise BackendError("stem: ended")
    except BackendError as error:
        os._exit(3 if "was ended" in str(error) else 4)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_process_has_a_watching_thread_of_its_own() -> None:
    """Oracle: the child's exit code, in time: a fork does not copy the parent's thread."""
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=HANG_S).returncode == 3
