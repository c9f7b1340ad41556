"""Q/DQ nodes around what multiplies: a part's graph in INT8 or FP8, with ranges from :mod:`bdexport.calibrate`.

    int8    symmetric: activations with one scale per tensor, weights with one per output channel; for ONNX Runtime
            uint8 activations with a zero point, at the layers' outputs as well
    fp8     E4M3, symmetric, the same scales in its range: the largest value becomes 448; convolutions only

Q/DQ is ONNX Runtime's static quantiser. Its FP8 derives scales from distributions that it gathers itself, and has one
per tensor of weights: FP8 is the INT8 graph with the type exchanged, since only the type differs, not where nodes must
stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from bdexport.backends.onnxruntime_common import import_onnxruntime
from bdexport.calibrate import QUANTISED, QUANTISER_MARK, write_ranges
from bdexport.errors import BuildError
from bdexport.files import scratch_folder

FP8_OPERATORS = ("Conv",)  # linear layers take no time, and round a mask's logits to 4 significant bits
FP8_OPSET, FP8_IR_VERSION = 19, 9  # the first in which Q/DQ nodes are defined for FP8
INT8_LARGEST, FP8_LARGEST = 127.0, 448.0
# ONNX Runtime's CPU kernels multiply integers only where a convolution's output is quantised as well. They take uint8
# activations: int8 ones are converted, but not where two convolutions read them (a transition's input), which are left
# in float then. The other backends fuse what follows a convolution with it, and take the output as it is.
INTEGER_KERNELS = ("onnxruntime",)
# Operators without weights, which stay in floating point; any other that is not QUANTISED must not go unnoticed.
FLOAT_OPERATORS = frozenset(
    ("Relu", "Add", "Sigmoid", "AveragePool", "MaxPool", "GlobalAveragePool", "Pad", "Slice", "Flatten", "Identity")
)


def int8_graph(
    part: str,
    model: onnx.ModelProto,
    ranges: Mapping[str, Any] | None,
    beside: Path,
    kernels: bool = False,
    operators: tuple[str, ...] = QUANTISED,
) -> onnx.ModelProto:
    """The graph with Q/DQ nodes at the inputs of convolutions and linear layers, or of fewer ``operators``.

    ``ranges`` are what :func:`bdexport.calibrate.calibrated` has for the part. Zero points are 0, weights carry a Q/DQ
    pair and biases stay float32: the form that TensorRT takes. ``kernels``: the form of :data:`INTEGER_KERNELS`: uint8
    activations with a zero point, outputs quantised too, after their ReLU where nothing else reads them. A part without
    a layer that multiplies comes back as it is. Scratch stands beside ``beside`` meanwhile. Raises :class:`BuildError`
    naming part, node and operator that cannot be quantised.
    """
    layers = _layers(part, model, operators)
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
        options["OpTypesToExcludeOutputQuantization"] = list(operators)
    with scratch_folder(beside) as folder:
        source, target, cache = folder / f"{part}.onnx", folder / "quantised.onnx", folder / "ranges.json"
        onnx.save_model(marked(model), source)  # a model in memory would be written to the system's temporary folder
        write_ranges(cache, ranges)
        quantize_static(
            source,
            target,
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(operators),
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
    _check_quantised(part, quantised, operators)
    return quantised


def fp8_graph(part: str, model: onnx.ModelProto, ranges: Mapping[str, Any] | None, beside: Path) -> onnx.ModelProto:
    """The graph as :func:`int8_graph` has it, with E4M3 in place of int8: weights and inputs of convolutions.

    Raises as :func:`int8_graph`.
    """
    quantised = int8_graph(part, model, ranges, beside, operators=FP8_OPERATORS)
    if quantised is model:  # nothing to quantise
        return model
    converted = onnx.version_converter.convert_version(quantised, FP8_OPSET)
    converted.ir_version = FP8_IR_VERSION
    onnx.helper.set_model_props(converted, {entry.key: entry.value for entry in model.metadata_props})
    del converted.graph.value_info[:]  # types of what was int8
    constants = {tensor.name: tensor for tensor in converted.graph.initializer}
    pairs = {(node.input[1], node.input[2]) for node in converted.graph.node if node.op_type == "QuantizeLinear"}
    for scale, zero in pairs:
        finer = numpy_helper.to_array(constants[scale]) * np.float32(INT8_LARGEST / FP8_LARGEST)
        constants[scale].CopyFrom(numpy_helper.from_array(finer, scale))
        zeros = numpy_helper.to_array(constants[zero]).astype(ml_dtypes.float8_e4m3fn)
        constants[zero].CopyFrom(numpy_helper.from_array(zeros, zero))
    onnx.checker.check_model(converted, full_check=True)
    return converted


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


def _layers(part: str, model: onnx.ModelProto, operators: tuple[str, ...]) -> list[onnx.NodeProto]:
    """The nodes that are to be quantised."""
    weights = {tensor.name for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        where = f"{part}: node {node.name or node.output[0]} ({node.op_type}) cannot be quantised"
        if node.op_type in operators:
            if node.input[1] not in weights:
                raise BuildError(where, got=f"weights {node.input[1]} that are computed", expected="constants")
            layers.append(node)
        elif node.op_type not in FLOAT_OPERATORS and node.op_type not in QUANTISED:
            expected = f"one of {', '.join((*QUANTISED, *sorted(FLOAT_OPERATORS)))}"
            raise BuildError(where, expected=expected, remedy="build with another precision")
    return layers


def _check_quantised(part: str, model: onnx.ModelProto, operators: tuple[str, ...]) -> None:
    """The quantiser leaves out what it cannot do, silently."""
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in operators and any(makers.get(name) != "DequantizeLinear" for name in node.input[:2]):
            raise BuildError(
                f"{part}: node {node.name or node.output[0]} ({node.op_type}) cannot be quantised",
                remedy="build with another precision",
            )
