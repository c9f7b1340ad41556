"""Networks with gates as ONNX graphs: what is exported of a comparison system depends on how it decides.

- ``sequential``: the parts of the network, as for any other, and a part for each gate: whoever runs them asks
  ``gate_07`` (activations in front of the block -> probability of keeping it) and then runs ``block_07`` or not.
- ``act``: one graph ``act``, because what a stage hands on is a weighted sum over its blocks and no block's output. It
  gives the logits ``y`` and the blocks that each image ran, ``mask`` bool (N, K). Every block but the first of a stage
  stands in an ``If`` that skips it once all images of the batch have halted: a batch of one saves what it does not run.
- ``sact``: refused. Engines run whole images, and no position of them can be left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bdexport.bundle import DTYPE, INPUT_NAME, OUTPUT_NAME
from bdexport.errors import ExportError
from bdexport.export import (
    IR_VERSION,
    OPSET,
    PART_PROPERTY,
    Progress,
    Specs,
    check_graph,
    chosen_parts,
    export_modules,
    onnx_from_module,
)
from bdexport.files import write_bytes
from bdexport.models.halting import HaltingGates, stages_of
from bdexport.models.pair import BlockDropNet
from bdexport.models.sequential import SequentialGates
from bdexport.partition import model_parts, part_module, part_specs
from bdexport.parts import FULL, HEAD, POLICY, STEM, block_part, gate_part
from bdexport.preprocess import Preprocess
from bdexport.tensors import BATCH, TensorSpec

ACT, MASK = "act", "mask"  # the part, and its second output


class GatePart(nn.Module):
    """(N, C, H, W) -> the unit's probability or score, (N, 1)."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.unit(x).sigmoid()
        return out


def export_gated(
    model: BlockDropNet,
    preprocess: Preprocess,
    folder: Path,
    parts: Iterable[str] | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """As :func:`bdexport.export.export_parts`, for a model with gates. Raises :class:`UsageError` or ExportError."""
    gates = model.gates
    if isinstance(gates, SequentialGates):
        return _sequential_parts(model, gates, preprocess, folder, parts, progress)
    assert isinstance(gates, HaltingGates)
    if gates.spec.kind == "sact":
        raise ExportError(
            "sact: decides for each position, and no engine leaves out positions; it is a reference for FLOPs",
            remedy="bdexport evaluate it, or export --method act or blockdrop",
        )
    chosen_parts(parts, (ACT,))
    if progress is not None:
        progress("export", 0, 1)
    graph = act_graph(model, gates, part_specs(model, preprocess))
    write_bytes(folder / f"{ACT}.onnx", graph.SerializeToString(deterministic=True))
    if progress is not None:
        progress("export", 1, 1)
    return {ACT: folder / f"{ACT}.onnx"}


def _sequential_parts(
    model: BlockDropNet,
    gates: SequentialGates,
    preprocess: Preprocess,
    folder: Path,
    parts: Iterable[str] | None,
    progress: Progress | None,
) -> dict[str, Path]:
    specs = dict(part_specs(model, preprocess))
    blocks = {block_part(index): index for index in range(model.network.spec.num_blocks)}
    modules: dict[str, nn.Module] = {}
    for part in model_parts(model):
        if part in blocks:
            gate = gate_part(blocks[part])
            modules[gate] = GatePart(gates.units[str(blocks[part])])
            specs[gate] = (specs[part][0], TensorSpec(OUTPUT_NAME, DTYPE, (1,)))
        if part != POLICY:
            modules[part] = part_module(model, part)
    return export_modules(
        {part: modules[part] for part in chosen_parts(parts, tuple(modules))}, specs, folder, progress
    )


# ---- ACT ---------------------------------------------------------------------------------------------------------


class _Nodes:
    """ONNX nodes and their weights, in order; of the whole graph, or of one branch of an ``If``."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Append one node; returns its output, which carries its name."""
        name = self.prefix + name
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: object, dtype: str) -> str:
        """Embed an array."""
        name = self.prefix + name
        self.weights.append(numpy_helper.from_array(np.array(values, dtype=dtype), name))
        return name

    def module(self, module: nn.Module, name: str, source: str, specs: tuple[TensorSpec, TensorSpec]) -> str:
        """Append a module's nodes on the tensor ``source``; returns its output."""
        graph = onnx_from_module(module, name, *specs).graph
        ours = {INPUT_NAME: source}
        inside = [*(weight.name for weight in graph.initializer), *(out for node in graph.node for out in node.output)]
        ours |= {theirs: f"{self.prefix}{name}/{theirs}" for theirs in inside}
        for weight in graph.initializer:
            weight.name = ours[weight.name]
            self.weights.append(weight)
        for node in graph.node:
            node.name = f"{self.prefix}{name}/{node.name}"
            node.input[:] = [ours[tensor] for tensor in node.input]
            node.output[:] = [ours[tensor] for tensor in node.output]
            self.nodes.append(node)
        return ours[OUTPUT_NAME]


class _ActWriter:
    """Writes the graph of :class:`HaltingGates` block by block. Halting values are (N, 1)."""

    def __init__(self, model: BlockDropNet, gates: HaltingGates, specs: Specs) -> None:
        self.model, self.gates, self.specs = model, gates, specs
        self.graph = _Nodes()
        self.zero = self.graph.constant("zero", 0.0, "float32")
        self.one = self.graph.constant("one", 1.0, "float32")
        self.threshold = self.graph.constant("threshold", gates.threshold, "float32")
        self.spatial = self.graph.constant("spatial_axes", [2, 3], "int64")
        self.ran: list[str] = []  # for each block, where it ran: bool (N, 1)

    def write(self) -> onnx.GraphProto:
        """The whole graph, from ``x`` to ``y`` and ``mask``."""
        network, graph, specs = self.model.network, self.graph, self.specs
        x = graph.module(network.stem, STEM, INPUT_NAME, specs[STEM])
        everywhere = self._everywhere()
        for stage in stages_of(network.spec):
            x = self._stage([block.index for block in stage], x, everywhere)
        graph.nodes.append(helper.make_node("Identity", [graph.module(network.head, HEAD, x, specs[HEAD])], ["y"]))
        graph.nodes.append(helper.make_node("Concat", self.ran, [MASK], name=MASK, axis=1))
        mask = helper.make_tensor_value_info(MASK, TensorProto.BOOL, [BATCH, len(self.ran)])
        ends = [_float_value(specs[FULL][0].name, specs[FULL][0]), _float_value(OUTPUT_NAME, specs[FULL][1]), mask]
        return helper.make_graph(graph.nodes, ACT, ends[:1], ends[1:], graph.weights)

    def _everywhere(self) -> str:
        """True for every image: the first block of each stage runs."""
        graph = self.graph
        batch = graph.add("Shape", "batch", INPUT_NAME, start=0, end=1)
        shape = graph.add("Concat", "halting_shape", batch, graph.constant("one_score", [1], "int64"), axis=0)
        value = numpy_helper.from_array(np.array([True]))
        return graph.add("ConstantOfShape", "everywhere", shape, value=value)

    def _stage(self, blocks: list[int], x: str, everywhere: str) -> str:
        """What the stage hands on: the weighted sum of its blocks' outputs."""
        first, *others = blocks
        y = self._block(self.graph, first, x)
        self.ran.append(everywhere)
        if not others:
            return y
        state = self._halting(self.graph, first, y, everywhere, None)
        for index in others[:-1]:
            state = self._unless_halted(index, state, last=False)
        return self._unless_halted(others[-1], state, last=True)[0]

    def _block(self, nodes: _Nodes, index: int, x: str) -> str:
        part = block_part(index)
        return nodes.module(part_module(self.model, part), part, x, self.specs[part])

    def _halting(
        self, nodes: _Nodes, index: int, y: str, active: str, before: tuple[str, ...] | None
    ) -> tuple[str, ...]:
        """One term of Eqns. 6 to 8: (out, y, active, cumulative) after a block that is not its stage's last."""
        spec = (TensorSpec(INPUT_NAME, DTYPE, self.specs[block_part(index)][1].shape), TensorSpec("y", DTYPE, (1,)))
        score = nodes.module(GatePart(self.gates.units[str(index)]), gate_part(index), y, spec)
        if before is None:
            cumulative, remainder = score, self.one
        else:
            counted = nodes.add("Where", "counted", active, score, self.zero)
            cumulative = nodes.add("Add", "cumulative", before[3], counted)
            remainder = nodes.add("Sub", "remainder", self.one, before[3])
        enough = nodes.add("GreaterOrEqual", f"enough_{index}", cumulative, self.threshold)
        halts = nodes.add("And", f"halts_{index}", active, enough)
        going_on = nodes.add("Where", f"going_on_{index}", active, score, self.zero)
        weight = nodes.add("Where", f"weight_{index}", halts, remainder, going_on)
        out = self._weighted(nodes, index, weight, y, None if before is None else before[0])
        still = nodes.add("And", f"still_{index}", active, nodes.add("Not", f"not_{index}", halts))
        return out, y, still, cumulative

    def _weighted(self, nodes: _Nodes, index: int, weight: str, y: str, before: str | None) -> str:
        term = nodes.add("Mul", f"term_{index}", nodes.add("Unsqueeze", f"wide_{index}", weight, self.spatial), y)
        return term if before is None else nodes.add("Add", f"sum_{index}", before, term)

    def _unless_halted(self, index: int, before: tuple[str, ...], last: bool) -> tuple[str, ...]:
        """A block inside an ``If``: skipped, with all that follows from it, when the whole batch has halted."""
        _, x, active, cumulative = before
        self.ran.append(active)
        then = _Nodes(f"{index}/")
        y = self._block(then, index, x)
        if last:
            rest = then.add("Sub", "remainder", self.one, cumulative)
            weight = then.add("Where", "weight", active, rest, self.zero)
            after: tuple[str, ...] = (self._weighted(then, index, weight, y, before[0]),)
        else:
            after = self._halting(then, index, y, active, before)
        otherwise = _Nodes(f"{index}/skipped/")
        kept = [otherwise.add("Identity", f"keep_{place}", tensor) for place, tensor in enumerate(before[: len(after)])]
        shape = self.specs[block_part(index)][1]
        any_left = self.graph.add(
            "ReduceMax",
            f"left_{index}",
            self.graph.add("Cast", f"left_as_{index}", active, to=TensorProto.FLOAT),
            keepdims=0,
        )
        results = [f"after_{index}_{place}" for place in range(len(after))]
        self.graph.nodes.append(
            helper.make_node(
                "If",
                [self.graph.add("Greater", f"any_left_{index}", any_left, self.zero)],
                results,
                name=f"unless_halted_{index}",
                then_branch=_branch(then, f"block_{index}", list(after), shape),
                else_branch=_branch(otherwise, f"no_block_{index}", kept, shape),
            )
        )
        return tuple(results)


def act_graph(model: BlockDropNet, gates: HaltingGates, specs: Specs) -> onnx.ModelProto:
    """The graph ``act`` as a checked ONNX model; ``specs`` are :func:`bdexport.partition.part_specs`."""
    result = helper.make_model(
        _ActWriter(model, gates, specs).write(),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="bdexport",
    )
    helper.set_model_props(result, {PART_PROPERTY: ACT})
    check_graph(result, ACT, specs[FULL][1])
    return result


def _branch(nodes: _Nodes, name: str, outputs: list[str], activations: TensorSpec) -> onnx.GraphProto:
    """One branch of an ``If``; its outputs are (out, y, active, cumulative), or ``out`` alone."""
    kinds = [
        _float_value(outputs[0], activations),
        *(_float_value(tensor, activations) for tensor in outputs[1:2]),
        *(helper.make_tensor_value_info(tensor, TensorProto.BOOL, [BATCH, 1]) for tensor in outputs[2:3]),
        *(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [BATCH, 1]) for tensor in outputs[3:4]),
    ]
    return helper.make_graph(nodes.nodes, name, [], kinds, nodes.weights)


def _float_value(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *spec.shape])
