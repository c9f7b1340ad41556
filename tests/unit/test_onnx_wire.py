"""ONNX messages read and written without the onnx package, with the onnx package as the oracle."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bdexport.backends import onnx_wire as wire
from bdexport.backends.onnx_model import Model


def model() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((300, 2), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Relu", ["t"], ["y"], name="last")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 300])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_reading_and_writing_gives_the_same_bytes() -> None:
    """Oracle: protobuf's own serialisation."""
    data = model().SerializeToString()
    assert wire.message(wire.read_fields(data)) == data
    graph = wire.only(wire.read_fields(data), wire.MODEL_GRAPH)
    assert wire.message(wire.read_fields(graph)) == graph == model().graph.SerializeToString()


def test_a_written_node_is_what_onnx_reads() -> None:
    """Oracle: onnx's parser."""
    inner = model().graph.SerializeToString()
    data = wire.node("If", ["c"], "out", [wire.graph_attribute("then_branch", inner)], domain="d")
    node = onnx.NodeProto.FromString(data)
    assert (node.op_type, list(node.input), list(node.output), node.name, node.domain) == (
        "If",
        ["c"],
        ["out"],
        "out",
        "d",
    )
    assert node.attribute[0].name == "then_branch"
    assert node.attribute[0].type == onnx.AttributeProto.GRAPH
    assert node.attribute[0].g == model().graph


def test_a_written_tensor_info_is_what_onnx_makes() -> None:
    """Oracle: onnx.helper."""
    for dtype, shape in ((TensorProto.FLOAT, (1, 64, 2)), (TensorProto.BOOL, ())):
        expected = helper.make_tensor_value_info("v", dtype, shape)
        assert onnx.ValueInfoProto.FromString(wire.tensor_info("v", dtype, shape)) == expected
    renamed = wire.renamed_info(wire.tensor_info("v", TensorProto.FLOAT, (3,)), "other")
    assert onnx.ValueInfoProto.FromString(renamed) == helper.make_tensor_value_info("other", TensorProto.FLOAT, (3,))


def test_an_input_is_renamed_and_nothing_else() -> None:
    """Oracle: onnx's parser; an attribute or output of the same name stays."""
    node = helper.make_node("Concat", ["x", "z", "x"], ["x"], name="x", axis=0)
    got = onnx.NodeProto.FromString(wire.with_input(node.SerializeToString(), "x", "new"))
    assert (list(got.input), list(got.output), got.name) == (["new", "z", "new"], ["x"], "x")


@pytest.mark.parametrize("cut", [1, 7, 100, 2000])
def test_truncated_bytes_are_refused(cut: int) -> None:
    """Oracle: the contract: ValueError, never another exception or a silent half."""
    with pytest.raises(ValueError, match=r"not an ONNX message|truncated"):
        wire.read_fields(model().SerializeToString()[:-cut])


def test_a_missing_field_is_refused() -> None:
    """Oracle: the contract."""
    with pytest.raises(ValueError, match="expected 1"):
        wire.only([], wire.MODEL_GRAPH)


def test_a_model_taken_apart_and_put_together_is_the_same() -> None:
    """Oracle: onnx's parser, on a model with attributes, properties, inner types and an operator domain of its own."""
    whole = model()
    helper.set_model_props(whole, {"bdexport.part": "stem"})
    whole.graph.node[1].attribute.append(helper.make_attribute("sizes", [1, 300, 2**40]))
    whole.graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, ["N", 2]))
    taken_apart = Model(whole.SerializeToString())
    assert onnx.load_from_string(taken_apart.to_bytes()) == whole
    assert taken_apart.nodes[1].sizes() == {"sizes": [1, 300, 2**40]}
    assert (taken_apart.inputs[0].channels, taken_apart.dims("w")) == (300, [300, 2])


@pytest.mark.parametrize("raw", [True, False])
def test_integers_of_a_constant_are_what_onnx_reads(raw: bool) -> None:
    """Oracle: the numbers that onnx.helper wrote, as raw bytes and as varints, negative ones among them."""
    values = [0, -1, 2**63 - 1, -(2**63), 300]
    data = np.array(values, np.int64).tobytes() if raw else values
    whole = model()
    whole.graph.initializer.append(helper.make_tensor("pads", TensorProto.INT64, [5], data, raw=raw))
    assert Model(whole.SerializeToString()).integers("pads") == values
    assert Model(whole.SerializeToString()).integers("w") is None
