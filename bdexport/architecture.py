"""What a network looks like, as plain data: residual network and policy network, without torch.

The specs here are what checkpoints store and what models are built from. Names follow He et al. (CVPR 2016):
``resnet{6n+2}`` are the CIFAR networks (three stages of n basic blocks, 16/32/64 channels),
``resnet{18,34,50,101,152}`` the ImageNet ones. ResNet-101 has stages [3, 4, 23, 3]; the "[3, 4, 20, 3]" in the
BlockDrop paper is a misprint.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bdexport.errors import UsageError

Family = Literal["cifar", "imagenet"]
BlockKind = Literal["basic", "bottleneck"]
Shortcut = Literal["avgpool", "option_a", "zeros_last", "conv"]
DroppedTransition = Literal["shortcut", "shortcut_relu"]
GateKind = Literal["sequential", "act", "sact"]

SHORTCUTS: dict[str, str] = {
    "avgpool": "average pooling, zero channels appended (the original BlockDrop code)",
    "option_a": "every second pixel, zero channels split evenly before and after (common public CIFAR ResNets)",
    "zeros_last": "every second pixel, zero channels appended (DownsampleA of other public CIFAR ResNets)",
    "conv": "1x1 convolution and batch norm (ImageNet ResNets, CIFAR 'option B')",
}
IMAGENET_STAGES: dict[int, tuple[BlockKind, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


@dataclass(frozen=True)
class BlockSpec:
    """One droppable residual block. ``transition``: its shortcut changes the shape, so it runs even when dropped.

    ``channels``: filters of its inner convolutions (the first; of a bottleneck the first and the second).
    """

    index: int
    kind: BlockKind
    in_channels: int
    channels: int
    out_channels: int
    stride: int
    transition: bool


@dataclass(frozen=True)
class ResNetSpec:
    """A residual network: ``stages`` counts the blocks of each stage, ``widths`` are the stages' inner channels.

    ``inner_widths``: of a network with pruned filters, the inner channels block by block (:mod:`bdexport.prune`);
    what a block gives out keeps the stage's width. None: as the stages say.
    """

    family: Family
    block: BlockKind
    stages: tuple[int, ...]
    widths: tuple[int, ...]
    shortcut: Shortcut
    num_classes: int
    dropped_transition: DroppedTransition = "shortcut"
    inner_widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.stages) != len(self.widths) or not self.stages or min(self.stages) < 1 or min(self.widths) < 1:
            raise UsageError(
                "network spec: stages and widths do not fit",
                got=f"stages {list(self.stages)}, widths {list(self.widths)}",
                expected="as many widths as stages, all positive",
            )
        if self.num_classes < 2:
            raise UsageError("network spec: too few classes", got=self.num_classes, expected="at least 2")
        inner = self.inner_widths
        if inner is not None and (len(inner) != self.num_blocks or min(inner) < 1):
            raise UsageError(
                "network spec: inner_widths do not fit",
                got=list(inner),
                expected=f"{self.num_blocks} positive numbers, one for each block",
            )

    @property
    def num_blocks(self) -> int:
        """K in the paper: the number of droppable blocks."""
        return sum(self.stages)

    @property
    def expansion(self) -> int:
        """Output channels of a block over its inner channels."""
        return 4 if self.block == "bottleneck" else 1

    @property
    def stem_channels(self) -> int:
        """Channels that enter the first block."""
        return self.widths[0]

    @property
    def name(self) -> str:
        """The field's name: layers with weights on the longest path, e.g. ``resnet32``."""
        per_block = 3 if self.block == "bottleneck" else 2
        return f"resnet{per_block * self.num_blocks + 2}"

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels that the family is trained on."""
        return 32 if self.family == "cifar" else 224

    def blocks(self) -> tuple[BlockSpec, ...]:
        """The K blocks in order of execution."""
        specs: list[BlockSpec] = []
        in_channels = self.stem_channels
        for stage, (count, width) in enumerate(zip(self.stages, self.widths, strict=True)):
            for position in range(count):
                stride = 2 if position == 0 and stage > 0 else 1
                out_channels = width * self.expansion
                transition = stride != 1 or in_channels != out_channels
                inner = width if self.inner_widths is None else self.inner_widths[len(specs)]
                specs.append(BlockSpec(len(specs), self.block, in_channels, inner, out_channels, stride, transition))
                in_channels = out_channels
        return tuple(specs)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that :func:`resnet_spec_from_json` reads back; ``inner_widths`` only where there are any."""
        data = asdict(self) | {"stages": list(self.stages), "widths": list(self.widths)}
        del data["inner_widths"]
        return data if self.inner_widths is None else data | {"inner_widths": list(self.inner_widths)}


@dataclass(frozen=True)
class PolicySpec:
    """A policy network: image -> K keep-probabilities in one shot (Wu et al. 2018, section 3.2).

    The image is average-pooled ``input_pool`` times first (2 for ImageNet: 112x112), then runs through a small ResNet
    with one or more basic blocks per stage and a linear layer with bias. ``hidden`` > 0: a layer of so many units with
    a ReLU comes before that one (the paper has none). ``stem_stride`` > 1, of CIFAR networks: the first convolution
    takes every so manieth pixel through a kernel of 2 stem_stride + 1 (1: 3x3 at full resolution, as in the paper).
    """

    family: Family
    stages: tuple[int, ...]
    widths: tuple[int, ...]
    num_blocks: int
    shortcut: Shortcut = "avgpool"
    input_pool: int = 1
    hidden: int = 0
    stem_stride: int = 1

    def __post_init__(self) -> None:
        if self.stem_stride > 1 and self.family != "cifar":
            raise UsageError(
                "policy spec: stem_stride",
                got=f"{self.stem_stride} for an {self.family} policy",
                expected="1: its stem has strides of its own",
                remedy="pool the image instead: --set policy.input_pool=2",
            )

    def backbone(self) -> ResNetSpec:
        """The policy's residual network without its final layer."""
        # num_classes is a placeholder: the policy replaces the classifier by its own K outputs.
        return ResNetSpec(self.family, "basic", self.stages, self.widths, self.shortcut, num_classes=2)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that :func:`policy_spec_from_json` reads back; what the paper's has not, only where it is."""
        data = asdict(self) | {"stages": list(self.stages), "widths": list(self.widths)}
        ordinary = {"hidden": 0, "stem_stride": 1}
        return {name: value for name, value in data.items() if name not in ordinary or value != ordinary[name]}


@dataclass(frozen=True)
class GateSpec:
    """Small units inside the network that decide while it runs, where a policy network decides beforehand.

    ``sequential``: one in front of each block, drop or keep (BlockDrop-seq, Wu et al. 2018, supplement). ``act``: one
    behind each block but the last of a stage, halt the stage or go on, per image; ``sact``: the same per position
    (Figurnov et al., CVPR 2017). ``margin``: of those two, epsilon there, a stage halts at a cumulative score of
    1 - margin; None for ``sequential``.
    """

    kind: GateKind
    margin: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields of this class."""
        return asdict(self)


def resnet_spec(
    name: str,
    num_classes: int = 10,
    shortcut: Shortcut | None = None,
    dropped_transition: DroppedTransition = "shortcut",
    family: Family | None = None,
) -> ResNetSpec:
    """The spec of a network by its usual name, e.g. ``resnet32`` or ``resnet101``.

    Depths 18, 34, 50, 101 and 152 are ImageNet networks unless ``family="cifar"`` asks for 6n+2 (50 and 152 are both).
    """
    match = re.fullmatch(r"resnet-?(\d+)", name.strip().lower())
    if match is None:
        raise UsageError("unknown architecture", got=repr(name), expected=_known_names())
    depth = int(match.group(1))
    if family != "cifar" and depth in IMAGENET_STAGES:
        block, stages = IMAGENET_STAGES[depth]
        return ResNetSpec(
            "imagenet", block, stages, (64, 128, 256, 512), shortcut or "conv", num_classes, dropped_transition
        )
    if family != "imagenet" and depth >= 8 and (depth - 2) % 6 == 0:
        per_stage = (depth - 2) // 6
        return ResNetSpec(
            "cifar", "basic", (per_stage,) * 3, (16, 32, 64), shortcut or "option_a", num_classes, dropped_transition
        )
    raise UsageError("unknown architecture", got=repr(name), expected=_known_names())


def policy_spec(network: ResNetSpec) -> PolicySpec:
    """The paper's policy network for ``network``: ResNet-8 for CIFAR, ResNet-10 at half resolution for ImageNet."""
    if network.family == "cifar":
        return PolicySpec("cifar", (1, 1, 1), (16, 32, 64), network.num_blocks, "avgpool", input_pool=1)
    return PolicySpec("imagenet", (1, 1, 1, 1), (64, 128, 256, 512), network.num_blocks, "conv", input_pool=2)


def resnet_spec_from_json(data: dict[str, Any]) -> ResNetSpec:
    """Inverse of :meth:`ResNetSpec.to_json`. Raises KeyError, TypeError or UsageError on anything else."""
    lists: dict[str, Any] = {name: tuple(data[name]) for name in ("stages", "widths", "inner_widths") if name in data}
    return ResNetSpec(**(data | lists))


def policy_spec_from_json(data: dict[str, Any]) -> PolicySpec:
    """Inverse of :meth:`PolicySpec.to_json`."""
    return PolicySpec(**(data | {"stages": tuple(data["stages"]), "widths": tuple(data["widths"])}))


def _known_names() -> str:
    imagenet = ", ".join(f"resnet{depth}" for depth in IMAGENET_STAGES)
    return f"resnet{{6n+2}} for CIFAR (resnet20, 32, 44, 56, 110) or one of {imagenet}"
