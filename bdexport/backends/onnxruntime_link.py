"""The parts' engines linked into one ONNX Runtime session: for all masks, with an ``If`` per block, or for one mask.

Why one session: with more than one thread, every session has a thread pool of its own, and the pools of a chain of
sessions spin against each other (ResNet-56, 2 threads, all blocks: 22 x the full network's time; 1.5 x without
spinning). The process-wide pool that ONNX Runtime offers instead makes every later session of the host program fail
unless it opts in. One session has one pool, and an ``If`` costs about what a session call costs (all blocks kept,
2 threads: 1.02 x full).

Linking happens when a bundle is opened, on bytes, since the run-time half has no onnx package: an engine's tensors
are named so that little has to be renamed (:func:`input_name`, :func:`output_name`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bdexport.backends import onnx_wire as wire
from bdexport.parts import HEAD, STEM, block_part, shortcut_part

SHARED_BYTES = 1024  # weights below this stay each session's own
CACHE_LINE = 64
INPUT, OUTPUT = "x", "y"  # of the linked model, and of engines that are not linked


def float_weights(engine: bytes) -> dict[str, NDArray[np.float32]]:
    """An engine's float32 initializers by name, copied; small ones are left out, since sharing them saves nothing.

    Raises ValueError for bytes that are no ONNX model.
    """
    graph = wire.read_fields(wire.only(wire.read_fields(engine), wire.MODEL_GRAPH))
    tensors = (
        wire.read_fields(value)
        for field, value in graph
        if field == wire.GRAPH_INITIALIZER and isinstance(value, bytes)
    )
    return {name: array for tensor in tensors for name, array in _float_weight(tensor) if array.nbytes >= SHARED_BYTES}


def _float_weight(tensor: wire.Fields) -> list[tuple[str, NDArray[np.float32]]]:
    """(name, array) of a TensorProto in raw form; nothing for any other type or form."""
    raw = [value for field, value in tensor if field == wire.TENSOR_RAW and isinstance(value, bytes)]
    if len(raw) != 1 or (wire.TENSOR_TYPE, wire.FLOAT) not in tensor:
        return []
    shape = [value for field, value in tensor if field == wire.TENSOR_DIMS and isinstance(value, int)]
    name = wire.only(tensor, wire.TENSOR_NAME).decode()
    return [(name, _aligned(np.frombuffer(raw[0], "<f4").reshape(shape)))]


def _aligned(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy that begins at a cache line, as ONNX Runtime's own do."""
    memory = np.empty(array.nbytes + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    copy = memory[start : start + array.nbytes].view(np.float32).reshape(array.shape)
    copy[...] = array
    return copy


def keep_name(index: int) -> str:
    """The linked model's input that decides on a block: a boolean scalar."""
    return f"keep_{index:02d}"


def activation_name(index: int) -> str:
    """The tensor that enters block ``index``, whatever ran before it."""
    return f"activation_{index:02d}"


def input_name(part: str) -> str:
    """What the engine of ``part`` calls its input."""
    kind, _, index = part.partition("_")
    if kind in ("block", "shortcut"):
        return activation_name(int(index))
    return "activation_last" if part == HEAD else INPUT


def output_name(part: str) -> str:
    """What the engine of ``part`` calls its output."""
    if part == STEM:
        return activation_name(0)
    return f"{part}/{OUTPUT}" if part.partition("_")[0] in ("block", "shortcut") else OUTPUT


class Linker:
    """The engines of one network, taken apart. Raises ValueError for bytes that are no ONNX model of the form above."""

    def __init__(self, engines: Mapping[str, bytes]) -> None:
        models = {part: wire.read_fields(data) for part, data in engines.items()}
        self._graphs = {part: wire.read_fields(wire.only(model, wire.MODEL_GRAPH)) for part, model in models.items()}
        header = [field for field in models[STEM] if field[0] == wire.MODEL_IR_VERSION]
        opsets = dict.fromkeys(field for model in models.values() for field in model if field[0] == wire.MODEL_OPSET)
        self._header = [*header, *opsets]

    def switched(self, num_blocks: int, transitions: frozenset[int]) -> bytes:
        """One model for all masks. Inputs: "x" and one ``keep_..`` per block; output: "y"."""
        body = _body(self._graphs[STEM])
        for index in range(num_blocks):
            after = input_name(HEAD) if index == num_blocks - 1 else activation_name(index + 1)
            then = self._graphs[block_part(index)]
            other = self._graphs[shortcut_part(index)] if index in transitions else _pass_on(then, index)
            branches = [
                wire.graph_attribute("then_branch", _without_inputs(then)),
                wire.graph_attribute("else_branch", _without_inputs(other)),
            ]
            body.append((wire.GRAPH_NODE, wire.node("If", [keep_name(index)], after, branches)))
        keeps = [wire.tensor_info(keep_name(index), wire.BOOL, ()) for index in range(num_blocks)]
        return self._model(body + _body(self._graphs[HEAD]), keeps)

    def path(self, parts: Sequence[str]) -> bytes:
        """One model for one mask, its parts in a row. Input: "x"; output: "y"."""
        body: wire.Fields = []
        before = INPUT
        for part in parts:
            for number, value in _body(self._graphs[part]):
                if number == wire.GRAPH_NODE and isinstance(value, bytes):
                    value = wire.with_input(value, input_name(part), before)
                body.append((number, value))
            before = output_name(part)
        return self._model(body, [])

    def _model(self, body: wire.Fields, more_inputs: Sequence[bytes]) -> bytes:
        inputs = [wire.only(self._graphs[STEM], wire.GRAPH_INPUT), *more_inputs]
        graph = wire.message(
            [*body, (wire.GRAPH_NAME, "chain")]
            + [(wire.GRAPH_INPUT, value) for value in inputs]
            + [(wire.GRAPH_OUTPUT, wire.only(self._graphs[HEAD], wire.GRAPH_OUTPUT))]
        )
        return wire.message([*self._header, (wire.MODEL_GRAPH, graph)])


def _body(graph: wire.Fields) -> wire.Fields:
    return [field for field in graph if field[0] in (wire.GRAPH_NODE, wire.GRAPH_INITIALIZER)]


def _without_inputs(graph: wire.Fields) -> bytes:
    # A branch has no inputs of its own: it reads the activation by name from the graph around it.
    return wire.message(field for field in graph if field[0] != wire.GRAPH_INPUT)


def _pass_on(block: wire.Fields, index: int) -> wire.Fields:
    """The branch of a dropped block that is no transition: the identity."""
    output = f"block_{index:02d}/dropped"
    info = wire.renamed_info(wire.only(block, wire.GRAPH_OUTPUT), output)
    identity = wire.node("Identity", [activation_name(index)], output)
    name = f"dropped_{index:02d}".encode()
    return [(wire.GRAPH_NODE, identity), (wire.GRAPH_NAME, name), (wire.GRAPH_OUTPUT, info)]
