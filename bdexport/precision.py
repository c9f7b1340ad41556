"""A part's ONNX graph in another precision: what strongly typed backends compute is written in the graph.

    fp16, bf16   every weight and activation in that type; input and output stay float32, with casts inside the part
    int8         Q/DQ nodes around convolutions and linear layers (static ranges from :mod:`bdexport.calibrate`),
                 symmetric: int8 activations with one scale per tensor, int8 weights with one per output channel;
                 for ONNX Runtime uint8 activations with a zero point, at the layers' outputs as well

The residual stream between parts is float32 in every precision, and in int8 the shortcut and its addition too: it is
what all blocks add to, each rounding of it stays to the end, and it is no convolution's time. Only what multiplies
reads rounded copies of it. docs/precisions.md has what was measured.

FP16 is ONNX Runtime's own converter; Q/DQ is its static quantiser. No converter to BF16 fits (NVIDIA's AutoCast has it
but asks for other versions of onnx and onnxruntime than these, and for CuPy): BF16 is the FP16 graph with the type
exchanged and the weights rounded again from float32, since only the type differs, not where casts must stand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from bdexport.backends.onnxruntime_common import import_onnxruntime
from bdexport.calibrate import QUANTISED, QUANTISER_MARK, Scales, write_ranges
from bdexport.errors import BuildError, UsageError
from bdexport.files import write_bytes

FP32, FP16, BF16, INT8 = "fp32", "fp16", "bf16", "int8"
PRECISIONS = (FP32, FP16, BF16, INT8)
BF16_OPSET = 22  # the first in which convolutions and pooling are defined for BF16

# What a backend converts to inside, from a hint: it gets the float32 graph.
BY_HINT = {"openvino": (BF16,)}
# ONNX Runtime's CPU kernels multiply integers only where a convolution's output is quantised as well. They take uint8
# activations: int8 ones are converted, but not where two convolutions read them (a transition's input), which are left
# in float then. The other backends fuse what follows a convolution with it, and take the output as it is.
INTEGER_KERNELS = ("onnxruntime",)
REASONS = {
    ("onnxruntime", FP16): "its CPU kernels convert to FP32 and compute in that",
    ("onnxruntime", BF16): "it has no CPU kernels for BF16 convolutions",
    ("openvino", FP16): "its CPU plugin has FP16 only where the processor has AMX-FP16, and lists none otherwise",
}
# Operators without weights, which stay in floating point; any other that is not QUANTISED must not go unnoticed.
FLOAT_OPERATORS = frozenset(
    ("Relu", "Add", "Sigmoid", "AveragePool", "MaxPool", "GlobalAveragePool", "Pad", "Slice", "Flatten", "Identity")
)


def check_offered(backend: str, precision: str, offered: tuple[str, ...]) -> None:
    """Raise :class:`UsageError`, with the reason where one is known, for a precision that a backend does not have."""
    if precision in offered:
        return
    reason = REASONS.get((backend, precision))
    what = "unknown precision" if precision not in PRECISIONS else f"precision {precision} is not offered"
    remedy = f"{backend} does not have it: {reason}" if reason else None
    raise UsageError(
        what, got=repr(precision), expected=f"{' or '.join(offered)} (what {backend} offers)", remedy=remedy
    )


def typed_graphs(
    graphs: Mapping[str, Path], precision: str, backend: str, folder: Path, scales: Scales | None = None
) -> dict[str, Path]:
    """What ``backend`` builds engines from: ``graphs`` (float32, by part) themselves, or converted ones in ``folder``.

    ``scales`` are needed for int8. Raises :class:`BuildError` naming part, node and operator.
    """
    if precision == FP32 or precision in BY_HINT.get(backend, ()):
        return dict(graphs)
    typed: dict[str, Path] = {}
    for part, graph in graphs.items():
        model = onnx.load(graph)
        if precision == INT8:
            assert scales is not None
            model = int8_graph(part, model, scales.ranges.get(part), kernels=backend in INTEGER_KERNELS)
        else:
            model = half_graph(part, model, precision)
        typed[part] = folder / f"{part}.onnx"
        write_bytes(typed[part], model.SerializeToString(deterministic=True))
    return typed


# ---- floating point ---------------------------------------------------------------------------------------------


def half_graph(part: str, model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The graph in FP16 or BF16 with float32 input and output. ``model`` is left as it was.

    Raises :class:`BuildError` for a weight beyond FP16's range.
    """
    import_onnxruntime()
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    if precision == FP16:
        _check_range(part, weights)
    source = onnx.ModelProto()
    source.CopyFrom(model)
    if precision == BF16:
        source = onnx.version_converter.convert_version(source, BF16_OPSET)
        onnx.helper.set_model_props(source, {entry.key: entry.value for entry in model.metadata_props})
    converted: onnx.ModelProto = convert_float_to_float16(source, keep_io_types=True)
    ONNXModel(converted).topological_sort()  # the converter puts a cast of what two nodes read behind them
    if precision == BF16:
        _exchange_type(converted, weights)
    onnx.checker.check_model(converted, full_check=True)
    return converted


def _check_range(part: str, weights: Mapping[str, Any]) -> None:
    limit = float(np.finfo(np.float16).max)
    for name, values in weights.items():
        if values.dtype == np.float32 and values.size and float(np.abs(values).max()) > limit:
            got, remedy = f"{np.abs(values).max():.3g}", "build with --precision bf16 or fp32"
            raise BuildError(f"{part}: {name} is beyond FP16's range", got=got, expected=f"{limit:g}", remedy=remedy)


def _exchange_type(model: onnx.ModelProto, weights: Mapping[str, Any]) -> None:
    """FLOAT16 becomes BFLOAT16 wherever it stands; weights are rounded from float32, not from FP16."""
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].astype(ml_dtypes.bfloat16), tensor.name))
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16


# ---- integers -----------------------------------------------------------------------------------------------------


def int8_graph(
    part: str, model: onnx.ModelProto, ranges: Mapping[str, Any] | None, *, kernels: bool = False
) -> onnx.ModelProto:
    """The graph with Q/DQ nodes at the inputs of convolutions and linear layers.

    ``ranges`` are what :func:`bdexport.calibrate.calibrated` has for the part. Zero points are 0, weights carry a Q/DQ
    pair and biases stay float32: the form that TensorRT takes. ``kernels``: the form of :data:`INTEGER_KERNELS`: uint8
    activations with a zero point, outputs quantised too, after their ReLU where nothing else reads them. A part without
    a layer that multiplies comes back as it is. Raises :class:`BuildError` naming part, node and operator that cannot
    be quantised.
    """
    layers = _layers(part, model)
    if not layers:
        return model
    missing = [name for node in layers for name in (node.input[0], node.output[0]) if name not in (ranges or {})]
    if missing:
        remedy = "calibrate again"
        raise BuildError(f"{part}: no calibrated range", got=missing[0], expected="one per tensor", remedy=remedy)
    assert ranges is not None
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    options: dict[str, Any] = {
        "ActivationSymmetric": not kernels,
        "WeightSymmetric": True,
        "AddQDQPairToWeight": True,
        "QuantizeBias": False,
    }
    if not kernels:
        options["OpTypesToExcludeOutputQuantization"] = list(QUANTISED)
    source = marked(model)
    with tempfile.TemporaryDirectory() as folder:
        target, cache = Path(folder, f"{part}.onnx"), Path(folder, "ranges.json")
        write_ranges(cache, ranges)
        quantize_static(
            source,
            target,
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=QuantType.QUInt8 if kernels else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            calibration_cache_path=cache,
            extra_options=options,
        )
        quantised = onnx.load(target)
    _restore_stream(quantised)
    onnx.helper.set_model_props(quantised, {entry.key: entry.value for entry in model.metadata_props})
    _check_quantised(part, quantised)
    return quantised


def _restore_stream(model: onnx.ModelProto) -> None:
    """What does not multiply reads the stream itself again: the quantiser hands a tensor's rounded copy to all readers.

    A shortcut with a rounded copy would round what all later blocks add to, once per block. Copies of outputs stay,
    since they are what integer kernels write, but for those that a ReLU alone reads whose output is quantised itself.
    """
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    original: dict[str, str] = {}  # rounded copy -> what it is a copy of
    for node in graph.node:
        source = makers.get(node.input[0])
        if node.op_type == "DequantizeLinear" and source is not None and source.op_type == "QuantizeLinear":
            original[node.output[0]] = source.input[0]
    others = [node for node in graph.node if node.op_type not in (*QUANTISED, "QuantizeLinear", "DequantizeLinear")]
    for node in others:
        for index, name in enumerate(node.input):
            maker = makers.get(original.get(name, ""))
            if name in original and (maker is None or maker.op_type not in QUANTISED):
                node.input[index] = original[name]
    for node in others:
        name = node.input[0]
        alone = node.op_type == "Relu" and name in original and _readers(graph, name) == ["Relu"]
        if alone and _readers(graph, node.output[0]) == ["QuantizeLinear"]:
            node.input[0] = original[name]
    _drop_unread(graph)


def _readers(graph: onnx.GraphProto, tensor: str) -> list[str]:
    """Operators of the nodes that read a tensor."""
    return [node.op_type for node in graph.node if tensor in node.input]


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove Q/DQ pairs that nothing reads any more, and their constants."""
    ends = {value.name for value in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | ends
        idle = [node for node in graph.node if node.output[0] not in read]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def marked(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that says it is prepared: the quantiser otherwise recommends, on stderr, what export has done already."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    entry = copy.metadata_props.add()
    entry.key, entry.value = QUANTISER_MARK
    return copy


def _layers(part: str, model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that are to be quantised."""
    weights = {tensor.name for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        where = f"{part}: node {node.name or node.output[0]} ({node.op_type}) cannot be quantised"
        if node.op_type in QUANTISED:
            if node.input[1] not in weights:
                raise BuildError(where, got=f"weights {node.input[1]} that are computed", expected="constants")
            layers.append(node)
        elif node.op_type not in FLOAT_OPERATORS:
            expected = f"one of {', '.join((*QUANTISED, *sorted(FLOAT_OPERATORS)))}"
            raise BuildError(where, expected=expected, remedy="build with another precision")
    return layers


def _check_quantised(part: str, model: onnx.ModelProto) -> None:
    """The quantiser leaves out what it cannot do, silently."""
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in QUANTISED and any(makers.get(name) != "DequantizeLinear" for name in node.input[:2]):
            raise BuildError(
                f"{part}: node {node.name or node.output[0]} ({node.op_type}) cannot be quantised",
                remedy="build with another precision",
            )
