"""Precisions in the graph: types, boundaries, values against float32, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from ml_dtypes import bfloat16, float8_e4m3fn
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny import tiny_model

from bdexport.backends.onnxruntime_common import import_onnxruntime, session_options
from bdexport.build import checked_backend
from bdexport.calibrate import part_ranges
from bdexport.config import BuildConfig
from bdexport.errors import BuildError, UsageError
from bdexport.export import export_parts
from bdexport.precision import half_graph, typed_graphs
from bdexport.preprocess import Preprocess
from bdexport.qdq import fp8_graph, int8_graph

Array = NDArray[np.float32]
BLOCK = "block_01"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export_parts(tiny_model(), Preprocess((24, 32)), tmp_path_factory.mktemp("graphs"))


def inputs(graph: onnx.ModelProto, count: int = 4, seed: int = 0) -> Array:
    shape = [dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim[1:]]
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def run(graph: onnx.ModelProto, x: Array) -> Array:
    """ONNX's own reference implementation, which has DequantizeLinear from opset 19 on."""
    if any(node.op_type == "DequantizeLinear" for node in graph.graph.node):
        graph = onnx.version_converter.convert_version(graph, 19)
    (y,) = ReferenceEvaluator(graph).run(None, {"x": x})
    return np.asarray(y)


def test_fp16_is_the_same_function_with_float32_ends(graphs: dict[str, Path]) -> None:
    """Oracle: ONNX's reference evaluator on both graphs; the types in the graph."""
    for part in ("policy", "stem", BLOCK, "shortcut_01", "head", "full"):
        graph = onnx.load(graphs[part])
        half = half_graph(part, graph, "fp16")
        x = inputs(graph)
        expected, got = run(graph, x), run(half, x)
        assert got.dtype == np.float32
        gap = np.abs(got - expected)
        assert gap.max() <= 0.01 * np.abs(expected).max(), f"{part}: largest {gap.max():.1e}, mean {gap.mean():.1e}"
        assert all(tensor.data_type != TensorProto.FLOAT for tensor in half.graph.initializer)


def test_bf16_weights_are_rounded_from_float32(graphs: dict[str, Path]) -> None:
    """Oracle: ml_dtypes' rounding; ONNX's full check, which knows BF16 convolutions from opset 22 on."""
    graph = onnx.load(graphs[BLOCK])
    brain = half_graph(BLOCK, graph, "bf16")
    onnx.checker.check_model(brain, full_check=True)
    ends = (*brain.graph.input, *brain.graph.output)
    assert {value.type.tensor_type.elem_type for value in ends} == {TensorProto.FLOAT}
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    floats = [tensor for tensor in brain.graph.initializer if tensor.data_type == TensorProto.BFLOAT16]
    assert floats
    for tensor in floats:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), before[tensor.name].astype(bfloat16))
    assert not any(tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16) for tensor in brain.graph.initializer)
    casts = [a.i for node in brain.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"]
    assert sorted(casts) == sorted([TensorProto.BFLOAT16, TensorProto.FLOAT])


def test_a_weight_beyond_fp16_is_named(graphs: dict[str, Path]) -> None:
    graph = onnx.load(graphs["stem"])
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((4, 3, 3, 3), 1e6, np.float32), "huge"))
    with pytest.raises(BuildError, match=r"stem: huge is beyond FP16's range: got 1e\+06, expected 65504; .*bf16"):
        half_graph("stem", graph, "fp16")


@pytest.mark.parametrize("kernels", [False, True])
def test_int8_is_per_channel_and_near(graphs: dict[str, Path], kernels: bool) -> None:
    """Oracle: ONNX's reference evaluator; the form TensorRT asks for (int8, zero points 0, one scale per channel)."""
    graph = onnx.load(graphs[BLOCK])
    x = inputs(graph, 16)
    ranges = part_ranges(BLOCK, graph, x, np.arange(16), 8, graphs[BLOCK])
    quantised = int8_graph(BLOCK, graph, ranges, graphs[BLOCK], kernels=kernels)
    expected, got = run(graph, x), run(quantised, x)
    gap = np.abs(got - expected)
    assert gap.mean() <= 0.05 * np.abs(expected).mean(), f"largest {gap.max():.1e}, mean {gap.mean():.1e}"
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    makers = {node.output[0]: node for node in quantised.graph.node}
    for node in quantised.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero, of_weights = constants[node.input[2]], constants[node.input[1]].ndim == 1
            assert zero.dtype == (np.uint8 if kernels and not of_weights else np.int8)
            assert kernels or not zero.any()
        if node.op_type == "Conv":
            weight = makers[node.input[1]]
            assert len(constants[weight.input[1]]) == constants[makers[weight.input[0]].input[0]].shape[0]


def test_fp8_is_rounding_to_e4m3(graphs: dict[str, Path]) -> None:
    """Oracle: ml_dtypes and numpy: every pair of nodes rounds to E4M3 of its scale; the largest value becomes 448.

    ONNX Runtime runs the nodes one by one; between them is ONNX's own convolution, in its reference implementation.
    """
    graph = onnx.load(graphs[BLOCK])
    x = inputs(graph, 16)
    ranges = part_ranges(BLOCK, graph, x, np.arange(16), 8, graphs[BLOCK])
    quantised = fp8_graph(BLOCK, graph, ranges, graphs[BLOCK])
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    nodes = {node.output[0]: node for node in quantised.graph.node}
    rounded = {name: node for name, node in nodes.items() if node.op_type == "DequantizeLinear"}
    assert len(rounded) == 4  # two convolutions, with their weights
    for name in rounded:
        quantised.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = import_onnxruntime().InferenceSession(quantised.SerializeToString(), session_options(1, optimise=False))
    y, *copies = session.run(None, {"x": x})
    found = dict(zip(rounded, copies, strict=True))
    read = {"x": x} | {name: values for name, values in constants.items() if name.endswith(".weight")}
    for name, node in rounded.items():
        source = nodes[node.input[0]]
        if source.input[0] in read:
            values, scale = read[source.input[0]], constants[node.input[1]]
            scale = scale[:, None, None, None] if scale.ndim else scale
            expected = np.clip(values / scale, -448, 448).astype(float8_e4m3fn).astype(np.float32) * scale
            np.testing.assert_allclose(found[name], expected, rtol=1e-6)
            assert np.abs(values / scale).max() == pytest.approx(448, rel=1e-5)
    gap, reference = np.abs(y - run(graph, x)), run(graph, x)
    assert 0 < gap.mean() <= 0.1 * np.abs(reference).mean(), f"largest {gap.max():.1e}, mean {gap.mean():.1e}"
    assert fp8_graph("head", onnx.load(graphs["head"]), None, graphs["head"]) == onnx.load(
        graphs["head"]
    )  # a linear layer alone


def test_a_part_that_does_not_multiply_stays_as_it_is(graphs: dict[str, Path]) -> None:
    graph = onnx.load(graphs["shortcut_01"])
    assert int8_graph("shortcut_01", graph, None, graphs["shortcut_01"]) == graph


def test_what_cannot_be_quantised_is_named(tmp_path: Path) -> None:
    """Oracle: the contract: part, node, operator."""
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, ["N", 4, 8, 8])], [value("y", TensorProto.FLOAT, None)]
    odd = helper.make_node("Softplus", ["x"], ["y"], name="odd")
    with pytest.raises(BuildError, match=r"block_00: node odd \(Softplus\) cannot be quantised, expected one of Conv"):
        int8_graph("block_00", helper.make_model(helper.make_graph([odd], "g", *ends)), {}, tmp_path / "graph")
    conv = helper.make_node("Conv", ["x", "x"], ["y"], name="dynamic")
    with pytest.raises(BuildError, match=r"node dynamic \(Conv\) cannot be quantised: got weights x that are computed"):
        int8_graph("block_00", helper.make_model(helper.make_graph([conv], "g", *ends)), {}, tmp_path / "graph")


def test_a_range_that_is_missing_is_named(graphs: dict[str, Path]) -> None:
    with pytest.raises(BuildError, match=f"{BLOCK}: no calibrated range: got x"):
        int8_graph(BLOCK, onnx.load(graphs[BLOCK]), {}, graphs[BLOCK])


def test_fp32_and_hints_take_the_graphs_as_exported(graphs: dict[str, Path], tmp_path: Path) -> None:
    assert typed_graphs(graphs, "fp32", "onnxruntime", tmp_path) == graphs
    assert typed_graphs(graphs, "bf16", "openvino", tmp_path) == graphs
    assert typed_graphs({BLOCK: graphs[BLOCK]}, "fp16", "tensorrt", tmp_path) == {BLOCK: tmp_path / f"{BLOCK}.onnx"}


@pytest.mark.parametrize(
    ("backend", "precision", "text"),
    [
        ("onnxruntime", "fp16", "precision fp16 is not offered.*fp32 or int8.*compute in that"),
        ("onnxruntime", "bf16", "no CPU kernels for BF16"),
        ("openvino", "fp16", "AMX-FP16"),
        (
            "onnxruntime",
            "fp8",
            "fp8 is not offered.*no CPU multiplies FP8; build with --precision int8, or with --backend t",
        ),
        (
            "openvino",
            "fp8",
            "fp8 is not offered.*no CPU multiplies FP8; build with --precision int8, or with --backend t",
        ),
        ("torch", "int8", r"expected fp32 \(what torch offers\)"),
        ("onnxruntime", "int3", "unknown precision: got 'int3'"),
    ],
)
def test_a_precision_that_a_backend_lacks_is_refused_with_its_reason(backend: str, precision: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        checked_backend(BuildConfig(backend=backend, precision=precision))


def test_onnxruntime_has_no_fp16_kernels_of_its_own(graphs: dict[str, Path]) -> None:
    """Oracle: the graph as ONNX Runtime optimises it. When this fails, FP16 can be offered on this processor."""
    from bdexport.backends.onnx_model import Model
    from bdexport.backends.onnxruntime_build import _optimised

    half = Model(half_graph(BLOCK, onnx.load(graphs[BLOCK]), "fp16").SerializeToString())
    built = onnx.shape_inference.infer_shapes(onnx.load_from_string(_optimised(half, BLOCK, graphs[BLOCK]).to_bytes()))
    weights = {tensor.name: tensor.data_type for tensor in built.graph.initializer}
    convolutions = [node for node in built.graph.node if node.op_type in ("Conv", "FusedConv")]
    assert {weights[node.input[1]] for node in convolutions} == {TensorProto.FLOAT}
