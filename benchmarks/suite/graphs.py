"""The network with its policy as one ONNX graph, every block inside an ``If``: what a user could export by hand.

The condition of an ``If`` is one boolean, so the graph decides for one image; batches are run image by image.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bdexport.export import IR_VERSION, OPSET, onnx_from_module
from bdexport.models.pair import BlockDropNet
from bdexport.partition import part_module, part_specs, transitions
from bdexport.parts import HEAD, KEEP_THRESHOLD, POLICY, STEM, block_part, shortcut_part
from bdexport.preprocess import Preprocess
from bdexport.tensors import BATCH, TensorSpec

IMAGE, LOGITS, KEEP = "x", "logits", "keep"
Specs = dict[str, tuple[TensorSpec, TensorSpec]]


def graph_with_ifs(model: BlockDropNet, preprocess: Preprocess, forced: bool) -> bytes:
    """Input "x" (1, 3, H, W), output "logits" (1, classes).

    ``forced``: the policy runs too (output "policy"), but input "keep", float (1, K), decides: kept where >= 0.5.
    """
    specs = part_specs(model, preprocess)
    num_blocks = model.network.spec.num_blocks
    nodes, weights = _part(model, POLICY, IMAGE, specs)
    probabilities = _output(POLICY)
    threshold = numpy_helper.from_array(np.array(KEEP_THRESHOLD, np.float32), "threshold")
    singles = [f"keep_{index:02d}" for index in range(num_blocks)]
    nodes.append(helper.make_node("Split", [KEEP if forced else probabilities], singles, axis=1))
    stem_nodes, stem_weights = _part(model, STEM, IMAGE, specs)
    nodes += stem_nodes
    x = _output(STEM)
    for index, single in enumerate(singles):
        nodes.append(helper.make_node("GreaterOrEqual", [single, "threshold"], [f"{single}/decided"]))
        branches = {
            "then_branch": _branch(model, block_part(index), x, specs),
            "else_branch": _dropped(model, index, x, specs),
        }
        after = f"activation_{index + 1:02d}"
        nodes.append(helper.make_node("If", [f"{single}/decided"], [after], **branches))
        x = after
    head_nodes, head_weights = _part(model, HEAD, x, specs)
    nodes += head_nodes
    nodes.append(helper.make_node("Identity", [_output(HEAD)], [LOGITS]))
    inputs = [_value(IMAGE, specs[STEM][0])]
    outputs = [_value(LOGITS, specs[HEAD][1])]
    if forced:
        inputs.append(_value(KEEP, specs[POLICY][1]))
        outputs.append(_value(probabilities, specs[POLICY][1]))
    graph = helper.make_graph(nodes, "network", inputs, outputs, [*weights, threshold, *stem_weights, *head_weights])
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(result)
    return bytes(result.SerializeToString())


def _part(
    model: BlockDropNet, part: str, source: str, specs: Specs
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A part's nodes and weights, reading the tensor ``source``, every name of its own under the part's."""
    graph = onnx_from_module(part_module(model, part), part, *specs[part]).graph
    names = {graph.input[0].name: source}
    names |= {weight.name: f"{part}/{weight.name}" for weight in graph.initializer}
    names |= {tensor: f"{part}/{tensor}" for node in graph.node for tensor in node.output}
    for weight in graph.initializer:
        weight.name = names[weight.name]
    for node in graph.node:
        node.name = f"{part}/{node.name}"
        node.input[:] = [names[tensor] for tensor in node.input]
        node.output[:] = [names[tensor] for tensor in node.output]
    return list(graph.node), list(graph.initializer)


def _branch(model: BlockDropNet, part: str, x: str, specs: Specs) -> onnx.GraphProto:
    nodes, weights = _part(model, part, x, specs)
    return helper.make_graph(nodes, part, [], [_value(_output(part), specs[part][1])], weights)


def _dropped(model: BlockDropNet, index: int, x: str, specs: Specs) -> onnx.GraphProto:
    """What is left of a dropped block: its shortcut part, or the identity."""
    if index in transitions(model):
        return _branch(model, shortcut_part(index), x, specs)
    name = f"dropped_{index:02d}"
    node = helper.make_node("Identity", [x], [name])
    return helper.make_graph([node], name, [], [_value(name, specs[block_part(index)][1])])


def _output(part: str) -> str:
    return f"{part}/y"


def _value(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *spec.shape])
