"""Residual networks as stem, blocks and head (He et al., CVPR 2016), with every block droppable.

A kept block gives ``relu(shortcut(x) + branch(x))``. A dropped block gives ``shortcut(x)``: for most blocks that is
``x`` itself, for a transition its shortcut part, with or without a ReLU as the checkpoint's ``dropped_transition`` says
(Wu et al., CVPR 2018, leave the ReLU out; with a convolutional shortcut the value can then go negative, which blocks
trained without dropping have never seen).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdexport.architecture import BlockSpec, ResNetSpec


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias (batch norm follows)."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class BasicBranch(nn.Module):
    """conv3x3-bn-relu-conv3x3-bn; (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.conv1 = conv3x3(spec.in_channels, spec.channels, spec.stride)
        self.bn1 = nn.BatchNorm2d(spec.channels)
        self.conv2 = conv3x3(spec.channels, spec.out_channels)
        self.bn2 = nn.BatchNorm2d(spec.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(x))
        return out


class BottleneckBranch(nn.Module):
    """conv1x1-bn-relu-conv3x3-bn-relu-conv1x1-bn, the stride on the 3x3 convolution (as torchvision has it)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(spec.in_channels, spec.channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.channels)
        self.conv2 = conv3x3(spec.channels, spec.channels, spec.stride)
        self.bn2 = nn.BatchNorm2d(spec.channels)
        self.conv3 = nn.Conv2d(spec.channels, spec.out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(spec.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out


class AvgPoolShortcut(nn.Module):
    """Average pooling by the stride, missing channels appended as zeros (BlockDrop's own CIFAR networks)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.stride = spec.stride
        self.extra_channels = spec.out_channels - spec.in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))


class OptionAShortcut(nn.Module):
    """Every ``stride``-th pixel, missing channels as zeros, half before and half after (He et al., option A)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.stride = spec.stride
        extra = spec.out_channels - spec.in_channels
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class ZerosLastShortcut(OptionAShortcut):
    """Every ``stride``-th pixel, missing channels appended as zeros (DownsampleA of other public CIFAR networks)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.before, self.after = 0, spec.out_channels - spec.in_channels


class ConvShortcut(nn.Module):
    """1x1 convolution and batch norm."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(spec.in_channels, spec.out_channels, 1, stride=spec.stride, bias=False)
        self.bn = nn.BatchNorm2d(spec.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


SHORTCUT_MODULES: dict[str, Callable[[BlockSpec], nn.Module]] = {
    "avgpool": AvgPoolShortcut,
    "option_a": OptionAShortcut,
    "zeros_last": ZerosLastShortcut,
    "conv": ConvShortcut,
}


def _shortcut(spec: BlockSpec, kind: str) -> nn.Module:
    if not spec.transition:
        return nn.Identity()
    # A shape change without a stride (the first bottleneck of ImageNet networks) only exists with a convolution;
    # pooling by 1 and padding channels is its parameter-free counterpart and needs no special case.
    return SHORTCUT_MODULES[kind](spec)


class Block(nn.Module):
    """One droppable residual block."""

    def __init__(self, spec: BlockSpec, network: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.branch = BottleneckBranch(spec) if spec.kind == "bottleneck" else BasicBranch(spec)
        self.shortcut = _shortcut(spec, network.shortcut)
        self.relu_when_dropped = spec.transition and network.dropped_transition == "shortcut_relu"

    def forward(self, x: Tensor) -> Tensor:
        """Kept: ``relu(shortcut(x) + branch(x))``."""
        return F.relu(self.shortcut(x) + self.branch(x))

    def dropped(self, x: Tensor) -> Tensor:
        """Dropped: ``shortcut(x)``, for a transition with the ReLU that the checkpoint's rule asks for."""
        out: Tensor = self.shortcut(x)
        return F.relu(out) if self.relu_when_dropped else out


class CifarStem(nn.Module):
    """conv3x3-bn-relu at full resolution; with a stride s > 1, a kernel of 2s + 1 that misses no pixel."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = (
            conv3x3(3, channels) if stride == 1 else nn.Conv2d(3, channels, 2 * stride + 1, stride, stride, bias=False)
        )
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ImageNetStem(nn.Module):
    """conv7x7/2-bn-relu-maxpool3x3/2: a quarter of the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.bn(self.conv(x))), 3, stride=2, padding=1)


class Head(nn.Module):
    """Global average pooling and the classifier: (N, C, H, W) -> logits (N, classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out


class ResNet(nn.Module):
    """Stem, K droppable blocks, head. Input: float (N, 3, H, W), preprocessed. Output: logits (N, classes)."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = CifarStem(spec.stem_channels) if spec.family == "cifar" else ImageNetStem(spec.stem_channels)
        self.blocks = nn.ModuleList(Block(block, spec) for block in spec.blocks())
        self.head = Head(spec.widths[-1] * spec.expansion, spec.num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Every block kept."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def forward_masked(self, x: Tensor, masks: Tensor) -> Tensor:
        """Run, per image, the blocks that ``masks`` (bool (N, K)) keeps; a block runs only on the images that keep it.

        Batch norm in training mode therefore gathers its statistics from the images that run the block, which is also
        what it sees at inference.
        """
        x = self.stem(x)
        # Known for all blocks before the first one runs, so that a GPU is waited for once and not once for each block.
        counts = masks.sum(dim=0).tolist()
        kept_first = masks.logical_not().t().to(torch.uint8).argsort(dim=1, stable=True)
        for block, count, rows in zip(self.blocks, counts, kept_first, strict=True):
            x = _run_rows(block, x, rows[:count])
        logits: Tensor = self.head(x)
        return logits

    def forward_gated(self, x: Tensor, gates: Tensor) -> Tensor:
        """Run every block on every image, and let its gate (float (N, K), 0 to 1) say how much of it counts.

        A block gives ``dropped(x) + gate * (kept(x) - dropped(x))``: what :meth:`forward_masked` gives for a gate of 0
        or 1 (in eval mode; batch norm in training mode would see images that drop the block), rules about ReLU
        included, and a gate's gradient is by how much keeping the block changes the loss.
        """
        x = self.stem(x)
        for block, gate in zip(self.blocks, gates.unbind(dim=1), strict=True):
            assert isinstance(block, Block)
            dropped, kept = block.dropped(x), block(x)
            x = torch.lerp(dropped.to(kept.dtype), kept, gate[:, None, None, None].to(kept.dtype))
        logits: Tensor = self.head(x)
        return logits


# A block runs on a multiple of this many images, so that oneDNN compiles kernels for a few batch sizes and not for
# every count from 1 to the batch (its cache holds 1,024). In time that did not show; see docs/training.md.
ROW_MULTIPLE = 16


def run_block(block: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """One block on a batch: run on the images that ``keep`` (bool (N,)) names, dropped for the others."""
    return _run_rows(block, x, keep.nonzero().squeeze(1))


def _run_rows(block: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    """One block on a batch: run on the images ``kept`` (int64, ascending), dropped for the others."""
    assert isinstance(block, Block)
    if len(kept) == len(x):
        kept_out: Tensor = block(x)
        return kept_out
    out = block.dropped(x)
    if len(kept) == 0:
        return out
    # Rows are moved as NHWC: on channels_last memory that copies whole images; as NCHW it converts the layout twice
    # (655 against 436 training images/s: benchmarks/masked_training.py).
    kept_out = block(_nhwc(x).index_select(0, _filled_up(kept)).permute(0, 3, 1, 2))[: len(kept)]
    return _nhwc(out).index_copy(0, kept, _nhwc(kept_out).to(out.dtype)).permute(0, 3, 1, 2)


def _filled_up(rows: Tensor) -> Tensor:
    """``rows`` repeated from the start up to a multiple of :data:`ROW_MULTIPLE`; the outputs of repeats are not used.

    In training mode a few images count twice in the block's batch-norm statistics, which stays an average over images
    that run the block.
    """
    wanted = -(-len(rows) // ROW_MULTIPLE) * ROW_MULTIPLE
    return rows if wanted == len(rows) else rows[torch.arange(wanted, device=rows.device) % len(rows)]


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def init_weights(module: nn.Module) -> None:
    """He initialisation of convolutions (fan-out), unit batch norm, as the ResNet paper trains from scratch."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def dtype_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Where and in what a module computes."""
    parameter = next(module.parameters())
    return parameter.dtype, parameter.device
