"""Networks with the same keys and shapes that compute something else: tried when a checkpoint's logits are not met.

Weights do not say where a stride is, what follows a stem, which activation or epsilon was used, or how a shortcut
without weights fills its channels. Each entry here is one such network; the one that gives the expected logits names
the difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bdexport.architecture import ResNetSpec, Shortcut
from bdexport.models.resnet import Block, BottleneckBranch, ResNet
from bdexport.preprocess import Preprocess

NOT_BUILT = "bdexport has no such network"
EPSILONS = (1e-3, 1e-4, 1e-6, 2e-5)  # TensorFlow's, others', MXNet's; torch's is 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLU": F.silu,
    "GELU": F.gelu,
    "leaky ReLU": F.leaky_relu,
    "ReLU6": F.relu6,
    "hard swish": F.hardswish,
}
NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR-10's, over all pixels": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100's": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "pixels / 255": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class LookAlike:
    """``difference``: what it does otherwise. ``remedy``: how to load it like that, or that it cannot be."""

    difference: str
    remedy: str
    run: Callable[[Tensor], Tensor]


def lookalikes(network: ResNet) -> Iterator[LookAlike]:
    """One network after another, each with one difference, on the weights of ``network``."""
    spec = network.spec
    if spec.shortcut != "conv":
        for kind in get_args(Shortcut):
            if kind not in (spec.shortcut, "conv"):
                yield LookAlike(f"shortcut {kind}", f"pass --shortcut {kind}", _with_shortcut(network, spec, kind))
    if spec.block == "bottleneck":
        yield LookAlike(
            "the stride of a stage in its first 1x1 convolution (ResNet v1)", NOT_BUILT, _with_early_strides(network)
        )
    for difference, stem in _stems(network):
        yield LookAlike(difference, NOT_BUILT, stem)
    for epsilon in EPSILONS:
        yield LookAlike(f"batch norm's epsilon {epsilon:g}", NOT_BUILT, _with_epsilon(network, epsilon))
    for name, activation in ACTIVATIONS.items():
        yield LookAlike(f"{name} instead of ReLU", NOT_BUILT, partial(_activated, network, activation))


def other_normalisations(preprocess: Preprocess) -> Iterator[tuple[str, str, Preprocess]]:
    """(name, remedy, preprocessing): the same geometry with another mean and deviation."""
    for name, (mean, std) in NORMALISATIONS.items():
        if (mean, std) != (preprocess.mean, preprocess.std):
            options = " ".join(
                f"--{option} {','.join(f'{value:g}' for value in values)}"
                for option, values in (("mean", mean), ("std", std))
            )
            yield f"another normalisation ({name})", f"pass {options}", replace(preprocess, mean=mean, std=std)


def _with_shortcut(network: ResNet, spec: ResNetSpec, kind: Shortcut) -> ResNet:
    other = ResNet(replace(spec, shortcut=kind))
    other.load_state_dict(network.state_dict())
    return other.eval()


def _with_early_strides(network: ResNet) -> ResNet:
    other = copy.deepcopy(network)
    for block in other.blocks:
        assert isinstance(block, Block)
        branch = block.branch
        assert isinstance(branch, BottleneckBranch)
        branch.conv1.stride, branch.conv2.stride = branch.conv2.stride, branch.conv1.stride
    return other


def _stems(network: ResNet) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    conv, bn = network.stem.conv, network.stem.bn
    assert isinstance(conv, nn.Conv2d)
    size = conv.kernel_size[0]
    ours = (2, "pooled") if network.spec.family == "imagenet" else (1, "alone")
    for stride in (1, 2):
        for pooling in ("alone", "pooled"):
            if (stride, pooling) != ours:
                words = "with a 3x3 max-pool" if pooling == "pooled" else "without max-pool"
                stem = partial(_stem, conv, bn, stride, pooling == "pooled")
                yield f"a {size}x{size} stem of stride {stride} {words}", partial(_behind, network, stem)


def _stem(conv: nn.Conv2d, bn: nn.Module, stride: int, pooled: bool, x: Tensor) -> Tensor:
    x = F.relu(bn(F.conv2d(x, conv.weight, stride=stride, padding=conv.kernel_size[0] // 2)))
    return F.max_pool2d(x, 3, stride=2, padding=1) if pooled else x


def _behind(network: ResNet, stem: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = stem(x)
    for block in network.blocks:
        x = block(x)
    logits: Tensor = network.head(x)
    return logits


def _with_epsilon(network: ResNet, epsilon: float) -> ResNet:
    other = copy.deepcopy(network)
    for layer in other.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = epsilon
    return other


class _Instead(TorchFunctionMode):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.activation(args[0]) if func in (F.relu, torch.relu) else func(*args, **(kwargs or {}))


def _activated(network: ResNet, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with _Instead(activation):
        logits: Tensor = network(x)
    return logits
