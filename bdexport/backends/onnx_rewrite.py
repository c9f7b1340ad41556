"""What backends for the CPU rewrite in a part's ONNX graph: shortcuts that pad channels, as convolutions."""

from __future__ import annotations

import numpy as np

from bdexport.backends.onnx_model import Model, Node, conv_node

WIDEST_CONV = 128 * 128  # input x output channels
# Operators that give as many channels as their first input has.
ROUNDING = ("QuantizeLinear", "DequantizeLinear")
SAME_CHANNELS = ("Relu", "Add", "Slice", "AveragePool", "MaxPool", "Identity", *ROUNDING)


def conv_from_pad(model: Model) -> None:
    """Rewrite zero-padded channels, after a strided slice or average pooling or not, as one convolution.

    The weights are 0 and 1 (or the pooling's 1 / k^2). ONNX Runtime has no blocked Slice and Pad, and falls back to
    NCHW around them (ResNet-32, one thread: the full network 8-11 % faster, the policy network 13 %). Wide layers are
    left alone: most of a wide convolution's products would be with zeros.
    """
    for node in [node for node in model.nodes if node.op == "Pad"]:
        pads = (model.integers(node.inputs[1]) or []) if len(node.inputs) == 2 else []
        channels = _channels(model, node.inputs[0])
        if len(pads) != 8 or any(pads[axis] for axis in (0, 2, 3, 4, 6, 7)) or channels is None:
            continue
        padded = pads[1] + channels + pads[5]
        if channels * padded > WIDEST_CONV:
            continue
        source, kernel, stride = node.inputs[0], 1, 1
        before = _maker(model, source)
        if before is not None and (found := _downsampling(before, model)):
            (kernel, stride), source = found, before.inputs[0]
            model.nodes.remove(before)
        weight = np.zeros((padded, channels, kernel, kernel), np.float32)
        weight[range(pads[1], pads[1] + channels), range(channels)] = 1 / kernel**2
        name = f"{node.name}.weight"
        model.add_constant(name, weight)
        conv = conv_node(node.name, source, name, node.outputs[0], weight.shape[2:], stride)
        model.nodes[model.nodes.index(node)] = conv


def _maker(model: Model, tensor: str) -> Node | None:
    return next((node for node in model.nodes if tensor in node.outputs), None)


def _downsampling(node: Node, model: Model) -> tuple[int, int] | None:
    """Kernel and stride of a node that thins out pixels; None for any other node."""
    if node.op == "Slice" and (stride := _slice_stride(node, model)):
        return 1, stride
    if node.op == "AveragePool":
        sizes = node.sizes()
        kernel, strides = sizes.get("kernel_shape", []), sizes.get("strides", [1, 1])
        plain = set(sizes) <= {"kernel_shape", "strides"} and len({*kernel, *strides}) == 1
        return (kernel[0], strides[0]) if plain else None
    return None


def _slice_stride(node: Node, model: Model) -> int:
    """The stride of a slice ``x[:, :, ::s, ::s]``; 0 for any other slice."""
    values = [model.integers(name) for name in node.inputs[1:]]
    if len(values) != 4 or any(value is None for value in values):
        return 0
    starts, ends, axes, steps = ([] if value is None else value for value in values)
    whole = starts == [0, 0] and min(ends) >= 2**31 - 1 and axes == [2, 3]
    return steps[0] if whole and steps[0] == steps[1] else 0


def _channels(model: Model, tensor: str) -> int | None:
    """Channels of a tensor, followed back to a convolution or the graph's input; None where that cannot be told."""
    while True:
        node = _maker(model, tensor)
        if node is None:
            return next((value.channels for value in model.inputs if value.name == tensor), None)
        if node.op == "Conv":
            return next(iter(model.dims(_constant(model, node.inputs[1]))), None)
        if node.op not in SAME_CHANNELS:
            return None
        tensor = node.inputs[0]


def _constant(model: Model, tensor: str) -> str:
    """The constant that a tensor is, rounded or not."""
    while (node := _maker(model, tensor)) is not None and node.op in ROUNDING:
        tensor = node.inputs[0]
    return tensor
