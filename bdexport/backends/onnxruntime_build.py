"""ONNX graph -> engine of the onnxruntime backend: optimised offline, with the CPU's own layout between parts.

ONNX Runtime is fastest on the CPU in its blocked layout NCHWc: channels in blocks of 8 or 16, a block innermost. Taken
alone, every part would convert its input to it and its output back. Here the conversions at the parts' boundaries are
cut away, so that activations stay blocked from the stem to the head (measured, ResNet-32, 7 of 15 blocks, one thread,
chain without policy: 1204 -> 1040 us at batch 1, 66.7 -> 56.1 ms at batch 64). What is declared as (N, C, H, W) is then
(N, C / c, H, W, c) in memory, and an engine belongs to CPUs with the same c: see ``OnnxRuntimeBackend.fingerprint``.

Whether a boundary is blocked follows from its channel count alone, so that all parts agree on it without seeing each
other. A part that ONNX Runtime does not block inside is wrapped in conversions.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import NodeProto, helper, numpy_helper

from bdexport import files
from bdexport.backends.onnx_rewrite import conv_from_pad
from bdexport.backends.onnxruntime_common import (
    BLOCK_PROPERTY,
    BLOCKED,
    INPUT_PROPERTY,
    NCHWC_DOMAIN,
    OUTPUT_PROPERTY,
    PART_PROPERTY,
    PLAIN,
    failures,
    import_onnxruntime,
    session_options,
)
from bdexport.backends.onnxruntime_link import input_name, output_name
from bdexport.errors import BuildError
from bdexport.parts import FULL, HEAD, POLICY, STEM

GUARD_IN, GUARD_OUT = "guard_in", "guard_out"


class NotBlockedError(Exception):
    """ONNX Runtime did not bring a part into the blocked layout at a boundary."""


def build_engine(part: str, graph: Path, engine: Path, block: int) -> None:
    """Write the engine of one part; ``block`` is the CPU's channel block, 1 where it has none.

    Raises :class:`BuildError` naming the part.
    """
    try:
        model = _read_graph(graph)
        if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            # Among integer kernels, which have no blocked layout, a float convolution costs two conversions of layout.
            conv_from_pad(model)
        cut_in, cut_out = _blocked_ends(part, model, block)
        built = _cut(model, part, cut_in, cut_out) if cut_in or cut_out else _optimised(model, part)
        _name_ends(built, part)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError, *failures()) as error:
        reason = " ".join(str(error).split())
        raise BuildError(f"{part} [onnxruntime]: cannot build from {graph} ({reason})") from error
    properties = {
        PART_PROPERTY: part,
        BLOCK_PROPERTY: str(block),
        INPUT_PROPERTY: BLOCKED if cut_in else PLAIN,
        OUTPUT_PROPERTY: BLOCKED if cut_out else PLAIN,
    }
    helper.set_model_props(built, properties)
    files.write_bytes(engine, built.SerializeToString(deterministic=True))


def _read_graph(path: Path) -> onnx.ModelProto:
    model = onnx.load(path)
    onnx.checker.check_model(model)
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise ValueError(f"{len(model.graph.input)} inputs, {len(model.graph.output)} outputs, expected one of each")
    return model


def _blocked_ends(part: str, model: onnx.ModelProto, block: int) -> tuple[bool, bool]:
    """Which ends of a part are activations in the blocked layout."""

    def blocked(value: onnx.ValueInfoProto) -> bool:
        return block > 1 and value.type.tensor_type.shape.dim[1].dim_value % block == 0

    cut_in = part not in (POLICY, STEM, FULL) and blocked(model.graph.input[0])
    cut_out = part not in (POLICY, HEAD, FULL) and blocked(model.graph.output[0])
    return cut_in, cut_out


def _optimised(model: onnx.ModelProto, part: str) -> onnx.ModelProto:
    """The model as ONNX Runtime would run it, its CPU-specific optimisations included."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads=1, optimise=True)
        options.optimized_model_filepath = str(Path(folder) / f"{part}.onnx")
        import_onnxruntime().InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


# ---- boundaries in the blocked layout -----------------------------------------------------------------------------


def _cut(model: onnx.ModelProto, part: str, cut_in: bool, cut_out: bool) -> onnx.ModelProto:
    try:
        return _without_guards(_optimised(_guarded(model, cut_in, cut_out), part), cut_in, cut_out)
    except NotBlockedError:
        return _wrapped(_optimised(model, part), cut_in, cut_out)


def _guarded(model: onnx.ModelProto, cut_in: bool, cut_out: bool) -> onnx.ModelProto:
    """The part between identity convolutions, which ONNX Runtime blocks: its own ends are then blocked tensors."""
    guarded = onnx.ModelProto()
    guarded.CopyFrom(model)
    graph = guarded.graph
    if cut_in:
        value = graph.input[0]
        conv = _identity_conv(graph, GUARD_IN, f"{GUARD_IN}/x", value.name, value)
        graph.node.insert(0, conv)
        value.name = f"{GUARD_IN}/x"
    if cut_out:
        value = graph.output[0]
        graph.node.append(_identity_conv(graph, GUARD_OUT, value.name, f"{GUARD_OUT}/y", value))
        value.name = f"{GUARD_OUT}/y"
    return guarded


def _identity_conv(
    graph: onnx.GraphProto, name: str, source: str, target: str, value: onnx.ValueInfoProto
) -> NodeProto:
    channels = value.type.tensor_type.shape.dim[1].dim_value
    weight = np.eye(channels, dtype=np.float32).reshape(channels, channels, 1, 1)
    graph.initializer.append(numpy_helper.from_array(weight, f"{name}.weight"))
    return helper.make_node("Conv", [source, f"{name}.weight"], [target], name=name, kernel_shape=[1, 1])


def _without_guards(model: onnx.ModelProto, cut_in: bool, cut_out: bool) -> onnx.ModelProto:
    """Remove the guards and the conversions outside them. Raises NotBlockedError where there are some inside them."""
    graph = model.graph
    if cut_in:
        reorder = _one(graph, "ReorderInput", source=graph.input[0].name)
        guard = _one(graph, "Conv", source=reorder.output[0])
        users = [node for node in graph.node if guard.output[0] in node.input]
        _require(bool(users) and all(_stays_blocked(user, "ReorderOutput") for user in users))
        graph.node.remove(reorder)
        graph.node.remove(guard)
        graph.input[0].name = guard.output[0]
    if cut_out:
        reorder = _one(graph, "ReorderOutput", target=graph.output[0].name)
        guard = _one(graph, "Conv", target=reorder.input[0])
        makers = [node for node in graph.node if guard.input[0] in node.output]
        _require(len(makers) == 1 and _stays_blocked(makers[0], "ReorderInput"))
        graph.node.remove(reorder)
        graph.node.remove(guard)
        graph.output[0].name = guard.input[0]
    _drop_unused_initializers(graph)
    return model


def _one(graph: onnx.GraphProto, op: str, source: str | None = None, target: str | None = None) -> NodeProto:
    """The only node that reads ``source`` or makes ``target``; it must be ``op`` of the blocked layout."""
    found: list[NodeProto] = [node for node in graph.node if source in node.input or target in node.output]
    _require(len(found) == 1 and found[0].domain == NCHWC_DOMAIN and found[0].op_type == op)
    return found[0]


def _stays_blocked(node: NodeProto, conversion: str) -> bool:
    return node.domain == NCHWC_DOMAIN and node.op_type != conversion


def _require(condition: bool) -> None:
    if not condition:
        raise NotBlockedError


def _wrapped(model: onnx.ModelProto, cut_in: bool, cut_out: bool) -> onnx.ModelProto:
    """A part that works in NCHW inside, with blocked ends: the conversions are made explicit."""
    graph = model.graph
    if cut_in:
        value = graph.input[0]
        channels = value.type.tensor_type.shape.dim[1].dim_value
        outer = f"{value.name}/blocked"
        reorder = helper.make_node(
            "ReorderOutput", [outer], [value.name], name=outer, domain=NCHWC_DOMAIN, channels=channels
        )
        graph.node.insert(0, reorder)
        value.name = outer
    if cut_out:
        value = graph.output[0]
        outer = f"{value.name}/blocked"
        graph.node.append(helper.make_node("ReorderInput", [value.name], [outer], name=outer, domain=NCHWC_DOMAIN))
        value.name = outer
    if not any(opset.domain == NCHWC_DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(NCHWC_DOMAIN, 1))
    return model


def _drop_unused_initializers(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


# ---- names --------------------------------------------------------------------------------------------------------


def _name_ends(model: onnx.ModelProto, part: str) -> None:
    """Unique names for all tensors, agreed names for the two ends, so that engines link without renaming."""
    graph = model.graph
    names = {graph.input[0].name: input_name(part), graph.output[0].name: output_name(part), "": ""}

    def renamed(name: str) -> str:
        return names.get(name, f"{part}:{name}")  # not "/", which the agreed names have

    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        node.name = f"{part}:{node.name}" if node.name else ""
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    graph.input[0].name, graph.output[0].name = input_name(part), output_name(part)
    graph.name = part
    del graph.value_info[:]
