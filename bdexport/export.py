"""Parts as ONNX graphs: one file per part, batch norm folded, batch size free, the same bytes every time.

The graphs are written from ``torch.fx`` traces with ``onnx.helper``, not by ``torch.onnx.export``: of its two
exporters one is deprecated and announced to be removed, the other needs one more package, takes 0.55 s for each part
(33 s for ResNet-110's sixty) and writes paths of this machine into the file. The networks here consist of eleven
operations; one that is not in the tables below is an :class:`ExportError`, and every graph is compared with torch when
a bundle is built.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bdexport.bundle import INPUT_NAME, OUTPUT_NAME
from bdexport.errors import ExportError, UsageError
from bdexport.files import write_bytes
from bdexport.models.pair import BlockDropNet
from bdexport.partition import model_parts, part_module, part_specs
from bdexport.preprocess import Preprocess
from bdexport.tensors import BATCH, TensorSpec

OPSET, IR_VERSION = 17, 8  # old enough for every run time named in pyproject.toml, TensorRT 10 included
PART_PROPERTY = "bdexport.part"  # metadata of each graph: the part's name

Specs: TypeAlias = Mapping[str, tuple[TensorSpec, TensorSpec]]
Progress: TypeAlias = Callable[[str, float, int], None]  # what is being done, steps done, steps in all


def export_parts(
    model: BlockDropNet,
    preprocess: Preprocess,
    folder: Path,
    parts: Iterable[str] | None = None,
    *,
    specs: Specs | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write ``folder/<part>.onnx`` for the given parts (all by default) and return the files by part.

    Input "x" and output "y" are float32 with a free first dimension; the model is left as it was. ``specs`` are
    :func:`bdexport.partition.part_specs`, if the caller has them. Raises :class:`UsageError` for a part that the model
    does not have, :class:`ExportError` for one that ONNX's checker or shape inference refuses.
    """
    chosen = chosen_parts(parts, model_parts(model))
    specs = specs or part_specs(model, preprocess)
    return export_modules({part: part_module(model, part) for part in chosen}, specs, folder, progress)


def export_modules(
    modules: Mapping[str, nn.Module], specs: Specs, folder: Path, progress: Progress | None = None
) -> dict[str, Path]:
    """Write ``folder/<part>.onnx`` for each module, by part; see :func:`export_parts`."""
    files: dict[str, Path] = {}
    for done, (part, module) in enumerate(modules.items()):
        if progress is not None:
            progress("export", done, len(modules))
        graph = onnx_from_module(module, part, *specs[part])
        files[part] = folder / f"{part}.onnx"
        write_bytes(files[part], graph.SerializeToString(deterministic=True))
    if progress is not None:
        progress("export", len(modules), len(modules))
    return files


def onnx_from_module(module: nn.Module, part: str, x: TensorSpec, y: TensorSpec) -> onnx.ModelProto:
    """One module, in evaluation mode, as a checked ONNX model with batch norm folded into the convolutions."""
    writer = _GraphWriter(fx.symbolic_trace(module), part)
    model = helper.make_model(
        helper.make_graph(writer.write(), part, [_value(x)], [_value(y)], writer.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="bdexport",
    )
    helper.set_model_props(model, {PART_PROPERTY: part})
    check_graph(model, part, y)
    return model


def check_graph(model: onnx.ModelProto, part: str, y: TensorSpec) -> None:
    """ONNX's full check, and shape inference from the input alone must arrive at ``y``. Raises :class:`ExportError`."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.graph.output[0].type.tensor_type.ClearField("shape")
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{part}: the ONNX checker refuses the graph ({error})") from error
    shape = tuple(dim.dim_param or dim.dim_value for dim in inferred.graph.output[0].type.tensor_type.shape.dim)
    if shape != (BATCH, *y.shape):
        raise ExportError(f"{part}: inferred output shape", got=shape, expected=(BATCH, *y.shape))


def chosen_parts(parts: Iterable[str] | None, every: Sequence[str]) -> tuple[str, ...]:
    """Those of ``every`` part that ``parts`` names, in order; None: all. Raises :class:`UsageError` on other names."""
    if parts is None:
        return tuple(every)
    wanted = set(parts)
    unknown = sorted(wanted - set(every))
    if unknown or not wanted:
        raise UsageError("parts to export", got=", ".join(unknown) or "none", expected=f"some of {', '.join(every)}")
    return tuple(part for part in every if part in wanted)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    assert spec.dtype == "float32"
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, [BATCH, *spec.shape])


# ---- from a torch.fx trace to ONNX nodes --------------------------------------------------------------------------


class _GraphWriter:
    """Walks a trace in order; each operation appends its ONNX nodes under the name it has in the trace."""

    def __init__(self, traced: fx.GraphModule, part: str) -> None:
        self.traced, self.part = traced, part
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tensors: dict[fx.Node, str] = {}  # the ONNX tensor that holds a traced value

    def write(self) -> list[onnx.NodeProto]:
        """The ONNX nodes, from tensor "x" to tensor "y"; :attr:`initializers` are complete afterwards."""
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.tensors[node] = INPUT_NAME
            elif node.op == "output":
                self._name_output(self.tensors[node.args[0]])
            else:
                self.tensors[node] = self._operation(node)(self, node)
        return self.nodes

    def _operation(self, node: fx.Node) -> Operation:
        tables = {"call_function": FUNCTIONS, "call_method": METHODS, "call_module": MODULES}
        table = tables.get(node.op, {})
        key = type(self.module(node)) if node.op == "call_module" else node.target
        if key not in table:
            raise ExportError(f"{self.part}: no ONNX counterpart is known for {node.name} ({key})")
        return table[key]

    def _name_output(self, tensor: str) -> None:
        if not self.nodes or self.nodes[-1].output[0] != tensor:
            raise ExportError(f"{self.part}: the output is not what the last operation gives", got=tensor)
        self.nodes[-1].output[0] = OUTPUT_NAME

    def module(self, node: fx.Node) -> nn.Module:
        """The layer that a ``call_module`` calls."""
        return self.traced.get_submodule(str(node.target))

    def tensor(self, node: Any) -> str:
        """The ONNX tensor of an operand."""
        if not isinstance(node, fx.Node):
            raise ExportError(f"{self.part}: an operand is no tensor", got=repr(node))
        return self.tensors[node]

    def add(self, op: str, name: str, inputs: list[str], **attributes: Any) -> str:
        """Append one node and return its output tensor, which carries the node's name."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Embed an array: weights as float32, the rest as int64."""
        if not np.isfinite(values).all():
            raise ExportError(f"{self.part}: {name} holds NaN or infinity", remedy="check the checkpoint")
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def require(self, condition: bool, node: fx.Node) -> None:
        """Refuse an option that the tables below would not carry over."""
        if not condition:
            raise ExportError(f"{self.part}: {node.name} uses an option without an ONNX counterpart here")


Operation: TypeAlias = Callable[[_GraphWriter, fx.Node], str]


def _conv(writer: _GraphWriter, node: fx.Node) -> str:
    layer = writer.module(node)
    assert isinstance(layer, nn.Conv2d)
    writer.require(layer.padding_mode == "zeros" and not isinstance(layer.padding, str), node)
    norm = _following_norm(writer, node)
    weight, bias = (_double(layer.weight), _double(layer.bias)) if norm is None else _folded(layer, norm)
    inputs = [writer.tensor(node.args[0]), writer.constant(f"{node.target}.weight", _array(weight))]
    if bias is not None:
        inputs.append(writer.constant(f"{node.target}.bias", _array(bias)))
    return writer.add(
        "Conv",
        node.name,
        inputs,
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=[*layer.padding, *layer.padding],
        dilations=layer.dilation,
        group=layer.groups,
    )


def _following_norm(writer: _GraphWriter, node: fx.Node) -> nn.BatchNorm2d | None:
    """The batch norm that alone reads a convolution's output."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    layer = writer.module(users[0])
    return layer if isinstance(layer, nn.BatchNorm2d) else None


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of ``norm(conv(x))`` as one convolution, computed in float64 and rounded once."""
    return fuse_conv_bn_weights(
        _double(conv.weight),
        _double(conv.bias),
        _double(norm.running_mean),
        _double(norm.running_var),
        norm.eps,
        _double(norm.weight),
        _double(norm.bias),
    )


def _norm(writer: _GraphWriter, node: fx.Node) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.op != "call_module" or type(writer.module(source)) is not nn.Conv2d or len(source.users) != 1:
        raise ExportError(f"{writer.part}: {node.name} follows no convolution of its own, so it cannot be folded")
    return writer.tensor(source)


def _linear(writer: _GraphWriter, node: fx.Node) -> str:
    layer = writer.module(node)
    assert isinstance(layer, nn.Linear)
    inputs = [writer.tensor(node.args[0]), writer.constant(f"{node.target}.weight", _array(layer.weight))]
    if layer.bias is not None:
        inputs.append(writer.constant(f"{node.target}.bias", _array(layer.bias)))
    return writer.add("Gemm", node.name, inputs, transB=1)


def _identity(writer: _GraphWriter, node: fx.Node) -> str:
    return writer.tensor(node.args[0])


def _relu(writer: _GraphWriter, node: fx.Node) -> str:
    return writer.add("Relu", node.name, [writer.tensor(node.args[0])])


def _sigmoid(writer: _GraphWriter, node: fx.Node) -> str:
    return writer.add("Sigmoid", node.name, [writer.tensor(node.args[0])])


def _add(writer: _GraphWriter, node: fx.Node) -> str:
    return writer.add("Add", node.name, [writer.tensor(operand) for operand in node.args])


def _avg_pool(writer: _GraphWriter, node: fx.Node) -> str:
    x, kernel = node.args
    writer.require(isinstance(kernel, int) and not node.kwargs, node)
    return writer.add("AveragePool", node.name, [writer.tensor(x)], kernel_shape=[kernel] * 2, strides=[kernel] * 2)


def _max_pool(writer: _GraphWriter, node: fx.Node) -> str:
    x, kernel = node.args
    options = dict(node.kwargs)
    stride, padding = options.pop("stride"), options.pop("padding")
    plain = options == {"dilation": 1, "ceil_mode": False, "return_indices": False}
    writer.require(plain and all(isinstance(value, int) for value in (kernel, stride, padding)), node)
    sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
    return writer.add("MaxPool", node.name, [writer.tensor(x)], **sizes)


def _pad(writer: _GraphWriter, node: fx.Node) -> str:
    x, pads = node.args
    assert isinstance(pads, tuple)
    writer.require(node.kwargs.get("mode") == "constant" and not node.kwargs.get("value"), node)
    # torch: (begin, end) pairs from the last dimension backwards; ONNX: all begins, then all ends, forwards.
    pairs = [(0, 0)] * (4 - len(pads) // 2) + list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    begins_ends = np.array([pair[0] for pair in pairs] + [pair[1] for pair in pairs], np.int64)
    return writer.add("Pad", node.name, [writer.tensor(x), writer.constant(f"{node.name}.pads", begins_ends)])


def _slice(writer: _GraphWriter, node: fx.Node) -> str:
    x, key = node.args
    slices = list(key) if isinstance(key, tuple) else []
    strided = all(isinstance(item, slice) and item == slice(None, None, item.step) for item in slices)
    writer.require(bool(slices) and strided, node)
    steps = {axis: item.step for axis, item in enumerate(slices) if isinstance(item, slice) and item.step is not None}
    writer.require(all(isinstance(step, int) and step > 0 for step in steps.values()), node)
    values = {
        "starts": [0] * len(steps),
        "ends": [np.iinfo(np.int64).max] * len(steps),
        "axes": list(steps),
        "steps": list(steps.values()),
    }
    inputs = [writer.constant(f"{node.name}.{name}", np.array(value, np.int64)) for name, value in values.items()]
    return writer.add("Slice", node.name, [writer.tensor(x), *inputs])


def _mean(writer: _GraphWriter, node: fx.Node) -> str:
    writer.require(len(node.args) == 1 and dict(node.kwargs) == {"dim": (2, 3)}, node)
    pooled = writer.add("GlobalAveragePool", f"{node.name}_pool", [writer.tensor(node.args[0])])
    return writer.add("Flatten", node.name, [pooled], axis=1)


FUNCTIONS: Mapping[Any, Operation] = {
    F.relu: _relu,
    F.avg_pool2d: _avg_pool,
    F.max_pool2d: _max_pool,
    F.pad: _pad,
    operator.add: _add,
    operator.getitem: _slice,
}
METHODS: Mapping[Any, Operation] = {"mean": _mean, "sigmoid": _sigmoid}
MODULES: Mapping[Any, Operation] = {nn.Conv2d: _conv, nn.BatchNorm2d: _norm, nn.Linear: _linear, nn.Identity: _identity}


def _double(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().cpu()


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return np.ascontiguousarray(array)
