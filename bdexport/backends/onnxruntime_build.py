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

from pathlib import Path

import numpy as np

from bdexport import files
from bdexport.backends import onnx_wire as wire
from bdexport.backends.onnx_model import Model, Node, Value, conv_node
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
        if not any(node.op == "QuantizeLinear" for node in model.nodes):
            # Among integer kernels, which have no blocked layout, a float convolution costs two conversions of layout.
            conv_from_pad(model)
        cut_in, cut_out = _blocked_ends(part, model, block)
        built = _cut(model, part, cut_in, cut_out, engine) if cut_in or cut_out else _optimised(model, part, engine)
        _name_ends(built, part)
    except (OSError, ValueError, *failures()) as error:  # type: ignore[misc]
        reason = " ".join(str(error).split())
        raise BuildError(f"{part} [onnxruntime]: cannot build from {graph} ({reason})") from error
    built.set_properties(
        {
            PART_PROPERTY: part,
            BLOCK_PROPERTY: str(block),
            INPUT_PROPERTY: BLOCKED if cut_in else PLAIN,
            OUTPUT_PROPERTY: BLOCKED if cut_out else PLAIN,
        }
    )
    files.write_bytes(engine, built.to_bytes())


def _read_graph(path: Path) -> Model:
    model = Model(path.read_bytes())
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(f"{len(model.inputs)} inputs, {len(model.outputs)} outputs, expected one of each")
    return model


def _blocked_ends(part: str, model: Model, block: int) -> tuple[bool, bool]:
    """Which ends of a part are activations in the blocked layout."""

    def blocked(value: Value) -> bool:
        return block > 1 and (value.channels or 0) % block == 0

    cut_in = part not in (POLICY, STEM, FULL) and blocked(model.inputs[0])
    cut_out = part not in (POLICY, HEAD, FULL) and blocked(model.outputs[0])
    return cut_in, cut_out


def _optimised(model: Model, part: str, beside: Path) -> Model:
    """The model as ONNX Runtime would run it, its CPU-specific optimisations included.

    Scratch stands beside ``beside`` meanwhile.
    """
    with files.scratch_folder(beside) as folder:
        options = session_options(threads=1, optimise=True)
        options.optimized_model_filepath = str(folder / f"{part}.onnx")
        import_onnxruntime().InferenceSession(model.to_bytes(), options, providers=["CPUExecutionProvider"])
        return Model(Path(options.optimized_model_filepath).read_bytes())


# ---- boundaries in the blocked layout -----------------------------------------------------------------------------


def _cut(model: Model, part: str, cut_in: bool, cut_out: bool, beside: Path) -> Model:
    try:
        return _without_guards(_optimised(_guarded(model, cut_in, cut_out), part, beside), cut_in, cut_out)
    except NotBlockedError:
        return _wrapped(_optimised(model, part, beside), cut_in, cut_out)


def _guarded(model: Model, cut_in: bool, cut_out: bool) -> Model:
    """The part between identity convolutions, which ONNX Runtime blocks: its own ends are then blocked tensors."""
    guarded = Model(model.to_bytes())
    if cut_in:
        value = guarded.inputs[0]
        guarded.nodes.insert(0, _identity_conv(guarded, GUARD_IN, f"{GUARD_IN}/x", value.name, value))
        value.name = f"{GUARD_IN}/x"
    if cut_out:
        value = guarded.outputs[0]
        guarded.nodes.append(_identity_conv(guarded, GUARD_OUT, value.name, f"{GUARD_OUT}/y", value))
        value.name = f"{GUARD_OUT}/y"
    return guarded


def _identity_conv(model: Model, name: str, source: str, target: str, value: Value) -> Node:
    assert value.channels is not None  # a blocked end has them
    weight = np.eye(value.channels, dtype=np.float32).reshape(value.channels, value.channels, 1, 1)
    model.add_constant(f"{name}.weight", weight)
    return conv_node(name, source, f"{name}.weight", target, (1, 1))


def _without_guards(model: Model, cut_in: bool, cut_out: bool) -> Model:
    """Remove the guards and the conversions outside them. Raises NotBlockedError where there are some inside them."""
    if cut_in:
        reorder = _one(model, "ReorderInput", source=model.inputs[0].name)
        guard = _one(model, "Conv", source=reorder.outputs[0])
        users = [node for node in model.nodes if guard.outputs[0] in node.inputs]
        _require(bool(users) and all(_stays_blocked(user, "ReorderOutput") for user in users))
        model.nodes.remove(reorder)
        model.nodes.remove(guard)
        model.inputs[0].name = guard.outputs[0]
    if cut_out:
        reorder = _one(model, "ReorderOutput", target=model.outputs[0].name)
        guard = _one(model, "Conv", target=reorder.inputs[0])
        makers = [node for node in model.nodes if guard.inputs[0] in node.outputs]
        _require(len(makers) == 1 and _stays_blocked(makers[0], "ReorderInput"))
        model.nodes.remove(reorder)
        model.nodes.remove(guard)
        model.outputs[0].name = guard.inputs[0]
    model.drop_unused_constants()
    return model


def _one(model: Model, op: str, source: str | None = None, target: str | None = None) -> Node:
    """The only node that reads ``source`` or makes ``target``; it must be ``op`` of the blocked layout."""
    found = [node for node in model.nodes if source in node.inputs or target in node.outputs]
    _require(len(found) == 1 and found[0].domain == NCHWC_DOMAIN and found[0].op == op)
    return found[0]


def _stays_blocked(node: Node, conversion: str) -> bool:
    return node.domain == NCHWC_DOMAIN and node.op != conversion


def _require(condition: bool) -> None:
    if not condition:
        raise NotBlockedError


def _wrapped(model: Model, cut_in: bool, cut_out: bool) -> Model:
    """A part that works in NCHW inside, with blocked ends: the conversions are made explicit."""
    if cut_in:
        value = model.inputs[0]
        assert value.channels is not None  # a blocked end has them
        outer = f"{value.name}/blocked"
        channels = [wire.integer_attribute("channels", value.channels)]
        reorder = Node("ReorderOutput", [outer], [value.name], outer, NCHWC_DOMAIN, channels)
        model.nodes.insert(0, reorder)
        value.name = outer
    if cut_out:
        value = model.outputs[0]
        outer = f"{value.name}/blocked"
        model.nodes.append(Node("ReorderInput", [value.name], [outer], outer, NCHWC_DOMAIN))
        value.name = outer
    model.add_opset(NCHWC_DOMAIN, 1)
    return model


# ---- names --------------------------------------------------------------------------------------------------------


class _Names(dict[str, str]):
    """Unique names for a part's tensors: the agreed ones for its two ends, the part before every other."""

    def __init__(self, part: str, ends: dict[str, str]) -> None:
        super().__init__(ends | {"": ""})
        self._part = part

    def __missing__(self, name: str) -> str:
        return f"{self._part}:{name}"  # not "/", which the agreed names have


def _name_ends(model: Model, part: str) -> None:
    """Unique names for all tensors, agreed names for the two ends, so that engines link without renaming."""
    source, target = model.inputs[0], model.outputs[0]
    model.rename(_Names(part, {source.name: input_name(part), target.name: output_name(part)}))
    for node in model.nodes:
        node.name = f"{part}:{node.name}" if node.name else ""
    source.name, target.name, model.name = input_name(part), output_name(part), part
