"""A part's ONNX graph in another precision: what strongly typed backends compute is written in the graph.

    fp16, bf16   every weight and activation in that type; input and output stay float32, with casts inside the part
    int8, fp8    Q/DQ nodes around convolutions and linear layers: :mod:`bdexport.qdq`

The residual stream between parts is float32 in every precision, and in int8 and fp8 the shortcut and its addition too:
it is what all blocks add to, each rounding of it stays to the end, and it is no convolution's time. Only what
multiplies reads rounded copies of it. docs/precisions.md has what was measured.

FP16 is ONNX Runtime's own converter. No converter to BF16 fits (NVIDIA's AutoCast has it but asks for other versions of
onnx and onnxruntime than these, and for CuPy): BF16 is the FP16 graph with the type exchanged and the weights rounded
again from float32, since only the type differs, not where casts must stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from bdexport.backends.onnxruntime_common import import_onnxruntime
from bdexport.calibrate import Scales
from bdexport.config import CALIBRATED
from bdexport.errors import BuildError, UsageError
from bdexport.files import write_bytes
from bdexport.qdq import INTEGER_KERNELS, fp8_graph, int8_graph

FP32, FP16, BF16, INT8, FP8 = "fp32", "fp16", "bf16", "int8", "fp8"
PRECISIONS = (FP32, FP16, BF16, INT8, FP8)
BF16_OPSET = 22  # the first in which convolutions and pooling are defined for BF16

# What a backend converts to inside, from a hint: it gets the float32 graph.
BY_HINT = {"openvino": (BF16,)}
NO_FP8 = "no CPU multiplies FP8; build with --precision int8, or with --backend tensorrt or tensorrt-rtx"
REASONS = {
    ("onnxruntime", FP16): "its CPU kernels convert to FP32 and compute in that",
    ("onnxruntime", BF16): "it has no CPU kernels for BF16 convolutions",
    ("openvino", FP16): "its CPU plugin has FP16 only where the processor has AMX-FP16, and lists none otherwise",
    ("onnxruntime", FP8): NO_FP8,
    ("openvino", FP8): NO_FP8,
}


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

    ``scales`` are needed for :data:`bdexport.config.CALIBRATED`. Raises :class:`BuildError` naming part, node
    and operator.
    """
    if precision == FP32 or precision in BY_HINT.get(backend, ()):
        return dict(graphs)
    typed: dict[str, Path] = {}
    for part, graph in graphs.items():
        model, typed[part] = onnx.load(graph), folder / f"{part}.onnx"
        if precision in CALIBRATED:
            assert scales is not None
            model = _calibrated(part, model, precision, backend, scales.ranges.get(part), typed[part])
        else:
            model = half_graph(part, model, precision)
        write_bytes(typed[part], model.SerializeToString(deterministic=True))
    return typed


def _calibrated(
    part: str, model: onnx.ModelProto, precision: str, backend: str, ranges: Mapping[str, Any] | None, beside: Path
) -> onnx.ModelProto:
    if precision == FP8:
        return fp8_graph(part, model, ranges, beside)
    return int8_graph(part, model, ranges, beside, kernels=backend in INTEGER_KERNELS)


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
