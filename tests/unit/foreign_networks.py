"""Networks of other people, written out independently of bdexport: the oracles of the checkpoint tests.

``PublicResNet`` has the attribute names of torchvision and of the public CIFAR networks, ``AuthorsResNet`` and
``AuthorsPolicy`` those of the BlockDrop authors' code (blocks and shortcuts apart, stages counted from 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class Branch(nn.Module):
    """The residual branch; ``conv3`` only in bottlenecks."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.layers = 3 if bottleneck else 2
        if bottleneck:
            self.conv1 = convolution(inputs, width, 1)
            self.conv2 = convolution(width, width, 3, stride)
            self.conv3 = convolution(width, width * 4, 1)
            self.bn3 = nn.BatchNorm2d(width * 4)
        else:
            self.conv1 = convolution(inputs, width, 3, stride)
            self.conv2 = convolution(width, width, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def branch(self, x: Tensor) -> Tensor:
        for number in range(1, self.layers + 1):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))
            x = F.relu(x) if number < self.layers else x
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)


class Subsample(nn.Module):
    """Option A: every second pixel, the new channels split before and after."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))


class Pool(nn.Module):
    """The authors' CIFAR shortcut: average pooling, the new channels at the end."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2)
        return torch.cat([x, torch.zeros_like(x)], dim=1)


def shortcut_of(kind: str, inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    if kind == "conv":
        return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    return Pool() if kind == "avgpool" else Subsample(outputs - inputs)


class PublicBlock(Branch):
    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, kind: str, name: str) -> None:
        super().__init__(inputs, width, stride, bottleneck)
        self.name = name
        self.add_module(name, shortcut_of(kind, inputs, width * (4 if bottleneck else 1), stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.get_submodule(self.name)(x))


class Stemmed(nn.Module):
    """``conv1`` and ``bn1``: 3x3 for CIFAR, 7x7 with a max pool for ImageNet."""

    def __init__(self, channels: int, imagenet: bool) -> None:
        super().__init__()
        self.imagenet = imagenet
        self.conv1 = convolution(3, channels, 7, 2) if imagenet else convolution(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)

    def seed(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.max_pool2d(x, 3, 2, padding=1) if self.imagenet else x


class PublicResNet(Stemmed):
    def __init__(
        self,
        stages: Sequence[int],
        widths: Sequence[int],
        classes: int,
        *,
        imagenet: bool = False,
        bottleneck: bool = False,
        kind: str = "option_a",
        shortcut: str = "shortcut",
        classifier: str = "linear",
    ) -> None:
        super().__init__(widths[0], imagenet)
        self.stages, self.classifier = len(stages), classifier
        inputs = widths[0]
        for stage, (count, width) in enumerate(zip(stages, widths, strict=True)):
            blocks = []
            for position in range(count):
                stride = 2 if stage and not position else 1
                blocks.append(PublicBlock(inputs, width, stride, bottleneck, kind, shortcut))
                inputs = width * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.add_module(classifier, nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.seed(x)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.get_submodule(self.classifier)(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class AuthorsResNet(Stemmed):
    def __init__(
        self,
        stages: Sequence[int],
        widths: Sequence[int],
        classes: int | None,
        imagenet: bool,
        bottleneck: bool = False,
    ) -> None:
        super().__init__(widths[0], imagenet)
        self.blocks, self.ds = nn.ModuleList(), nn.ModuleList()
        inputs = widths[0]
        for stage, (count, width) in enumerate(zip(stages, widths, strict=True)):
            outputs, stride = width * (4 if bottleneck else 1), 2 if stage else 1
            self.ds.append(shortcut_of("conv" if imagenet else "avgpool", inputs, outputs, stride))
            first = Branch(inputs, width, stride, bottleneck)
            self.blocks.append(
                nn.ModuleList([first, *(Branch(outputs, width, 1, bottleneck) for _ in range(count - 1))])
            )
            inputs = outputs
        self.fc = nn.Sequential() if classes is None else nn.Linear(inputs, classes)

    def forward(self, x: Tensor, mask: Sequence[bool] | None = None) -> Tensor:
        """One mask for the whole batch; a dropped block leaves its shortcut, without a ReLU."""
        x, index = self.seed(x), 0
        for blocks, shortcut in zip(self.blocks, self.ds, strict=True):
            assert isinstance(blocks, nn.ModuleList)
            for position, block in enumerate(blocks):
                identity = x if position else shortcut(x)
                x = F.relu(identity + block(x)) if mask is None or mask[index] else identity
                index += 1
        out: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


class AuthorsPolicy(nn.Module):
    def __init__(self, stages: Sequence[int], widths: Sequence[int], num_blocks: int, imagenet: bool) -> None:
        super().__init__()
        self.imagenet = imagenet
        self.features = AuthorsResNet(stages, widths, None, imagenet)
        self.logit = nn.Linear(widths[-1], num_blocks)
        self.vnet = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep-probabilities (N, K)."""
        return torch.sigmoid(self.logit(self.features(F.avg_pool2d(x, 2) if self.imagenet else x)))


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training: none of their four tensors left at its initial value. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            for tensor, low, high in (
                (layer.weight, 0.4, 0.9),
                (layer.bias, -0.3, 0.3),
                (layer.running_mean, -0.3, 0.3),
                (layer.running_var, 0.6, 1.6),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()
