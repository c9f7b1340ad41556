"""Which network a state dict belongs to, told from its keys and shapes.

Two ways of naming residual blocks occur: ``layer1.0.conv1.weight`` (torchvision, timm, the public CIFAR networks) and
``blocks.0.0.conv1.weight`` (the authors' BlockDrop code, stages counted from 0, shortcuts apart in ``ds``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from bdexport.architecture import BlockKind, Family
from bdexport.checkpoint.fitting import shown
from bdexport.errors import CheckpointError

MAX_STAGES, MAX_BLOCKS_PER_STAGE, MAX_WIDTH = 8, 500, 8192  # a file's numbers are not trusted with our memory
MAX_CLASSES = 1_000_000
NO_IMAGES = "bdexport reads images of three channels, and makes grey of them; no others"
STEM_KERNELS: dict[tuple[int, ...], Family] = {(3, 3): "cifar", (7, 7): "imagenet"}


@dataclass(frozen=True)
class Naming:
    """How a file names its tensors; turns our names into the file's (``theirs``)."""

    blocks: Literal["layer", "flat"]
    shortcut: str  # "shortcut" or "downsample"; the flat form has "ds" apart from the blocks
    classifier: str  # "fc", "linear", "fc.1" behind a Dropout; "logit" for a policy

    def theirs(self, ours: str, stages: tuple[int, ...]) -> str:
        """``blocks.5.branch.conv1.weight`` -> ``layer2.0.conv1.weight``, for a network with these stages."""
        top, _, rest = ours.partition(".")
        if top == "stem":
            return {"conv": "conv1", "bn": "bn1"}[rest.partition(".")[0]] + "." + rest.partition(".")[2]
        if top != "blocks":
            return f"{self.classifier}.{ours.rpartition('.')[2]}"
        index, _, rest = rest.partition(".")
        stage, position = _place(int(index), stages)
        part, _, rest = rest.partition(".")
        if part == "branch":
            return f"{self.block(stage, position)}.{rest}"
        layer, _, leaf = rest.partition(".")
        return f"{self._shortcut(stage, position)}.{'0' if layer == 'conv' else '1'}.{leaf}"

    def block(self, stage: int, position: int) -> str:
        """The file's prefix of a block's branch, stage and position from 0."""
        return f"blocks.{stage}.{position}" if self.blocks == "flat" else f"layer{stage + 1}.{position}"

    def _shortcut(self, stage: int, position: int) -> str:
        return f"ds.{stage}" if self.blocks == "flat" else f"{self.block(stage, position)}.{self.shortcut}"


@dataclass(frozen=True)
class Found:
    """What keys and shapes tell. ``classes``: None without a classifier; ``conv_shortcut``: shortcuts have weights."""

    naming: Naming
    family: Family
    block: BlockKind
    stages: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int | None
    conv_shortcut: bool


def recognise(state: Mapping[str, Any], what: str) -> Found:
    """Read the network off a state dict. Raises :class:`CheckpointError` when it is none of the known ResNets."""
    flat = any(re.match(r"blocks\.\d+\.\d+\.", key) for key in state)
    prefix = r"blocks\.(\d+)\.(\d+)\." if flat else r"layer(\d+)\.(\d+)\."
    stages = _stages(state, prefix, 0 if flat else 1, what)
    shortcut = "shortcut" if any(".shortcut." in key for key in state) else "downsample"
    naming = Naming("flat" if flat else "layer", shortcut, _classifier(state, what))
    first = [naming.block(stage, 0) for stage in range(len(stages))]
    _refuse_variants(state, first, what)
    widths = tuple(_shape(state, f"{block}.conv1.weight", 4, what)[0] for block in first)
    if max(widths) > MAX_WIDTH:
        raise CheckpointError(f"{what}: too wide", got=f"{max(widths)} channels", expected=f"at most {MAX_WIDTH}")
    return Found(
        naming=naming,
        family=_family(state, what),
        block="bottleneck" if f"{first[0]}.conv3.weight" in state else "basic",
        stages=stages,
        widths=widths,
        classes=_classes(state, naming.classifier, what),
        conv_shortcut=any(re.search(r"(^ds|\.shortcut|\.downsample)\.\d", key) for key in state),
    )


def _stages(state: Mapping[str, Any], pattern: str, first: int, what: str) -> tuple[int, ...]:
    """Blocks per stage, from the highest numbers that occur; a gap shows up later as missing keys."""
    counts: dict[int, int] = {}
    for key in state:
        match = re.match(pattern, key)
        if match is not None and max(map(len, match.groups())) <= 4:
            stage, position = int(match.group(1)) - first, int(match.group(2))
            counts[stage] = max(counts.get(stage, 0), position + 1)
    if not counts or "conv1.weight" not in state:
        keys = ", ".join(shown(key) for key in list(state)[:5]) or "none"
        raise CheckpointError(
            f"{what}: not a ResNet in a form that is known",
            got=f"{len(state)} keys: {keys}{', ..' if len(state) > 5 else ''}",
            expected="conv1.weight, bn1.weight, layer1.0.conv1.weight .. fc.weight, or blocks.0.0.conv1.weight ..",
            remedy="docs/checkpoints.md lists the forms; `bdexport zoo` lists trained networks to start from",
        )
    if max(counts) >= MAX_STAGES or max(counts.values()) > MAX_BLOCKS_PER_STAGE:
        raise CheckpointError(
            f"{what}: too deep",
            got=f"{max(counts) + 1} stages, up to {max(counts.values())} blocks each",
            expected=f"at most {MAX_STAGES} stages of {MAX_BLOCKS_PER_STAGE}",
        )
    if sum(counts.values()) > len(state):
        raise CheckpointError(
            f"{what}: the weights do not fit",
            got=f"{len(state)} keys",
            expected=f"those of {sum(counts.values())} blocks",
        )
    return tuple(counts.get(stage, 1) for stage in range(max(counts) + 1))


def _family(state: Mapping[str, Any], what: str) -> Family:
    shape = _shape(state, "conv1.weight", 4, what)
    if shape[2:] not in STEM_KERNELS:
        raise CheckpointError(
            f"{what}: conv1.weight has a kernel of another size",
            got=f"{shape[2]}x{shape[3]}",
            expected="3x3 (CIFAR networks) or 7x7 (ImageNet networks)",
        )
    if shape[1] != 3:
        raise CheckpointError(
            f"{what}: conv1.weight", got=f"{shape[1]} input channels", expected="3 (RGB), or 1 (grey)", remedy=NO_IMAGES
        )
    return STEM_KERNELS[shape[2:]]


def _refuse_variants(state: Mapping[str, Any], first: list[str], what: str) -> None:
    """Relatives of the ResNet whose keys look the same and whose blocks compute something else."""
    for block in first:
        if f"{block}.conv3.weight" not in state:
            continue
        inner = _shape(state, f"{block}.conv2.weight", 4, what)
        width = _shape(state, f"{block}.conv1.weight", 4, what)[0]
        outer = _shape(state, f"{block}.conv3.weight", 4, what)[0]
        if inner[1] != width:
            _refuse(what, f"{block}.conv2.weight", "grouped convolutions (a ResNeXt)", f"{inner[1]} of {width} inputs")
        if outer != 4 * width:
            _refuse(what, f"{block}.conv3.weight", "widened bottlenecks (a Wide ResNet)", f"{width} to {outer}")


def _refuse(what: str, key: str, kind: str, got: str) -> None:
    raise CheckpointError(
        f"{what}: {key}: {kind} are not supported", got=got, expected="a plain ResNet, basic or bottleneck"
    )


def _classifier(state: Mapping[str, Any], what: str) -> str:
    """The name of the last layer: a usual one, or else that of the only linear layer; "fc" where there is none."""
    named = next((name for name in ("linear", "fc") if f"{name}.weight" in state), None)
    if named is not None:
        return named
    linear = [key for key, value in state.items() if key.endswith(".weight") and isinstance(value, Tensor)]
    linear = [key.removesuffix(".weight") for key in linear if state[key].ndim == 2]
    if len(linear) > 1:
        raise CheckpointError(
            f"{what}: a classifier of {len(linear)} linear layers",
            got=", ".join(map(shown, linear[:5])),
            expected="one, fc or linear, alone or behind a Dropout",
            remedy="put one linear layer in the place of the others, train it, and save again",
        )
    return linear[0] if linear else "fc"


def _classes(state: Mapping[str, Any], classifier: str, what: str) -> int | None:
    key = f"{classifier}.weight"
    classes = _shape(state, key, 2, what)[0] if key in state else None
    if classes is not None and classes > MAX_CLASSES:
        raise CheckpointError(f"{what}: {key}: too many classes", got=classes, expected=f"at most {MAX_CLASSES}")
    return classes


def _shape(state: Mapping[str, Any], key: str, rank: int, what: str) -> tuple[int, ...]:
    value = state.get(key)
    if value is None:
        raise CheckpointError(f"{what}: the weights do not fit: 1 key missing ({key})")
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what}: {key}", got=type(value).__name__, expected="a tensor")
    if value.ndim != rank:
        raise CheckpointError(f"{what}: {key}", got=f"shape {list(value.shape)}", expected=f"{rank} dimensions")
    return tuple(value.shape)


def _place(index: int, stages: tuple[int, ...]) -> tuple[int, int]:
    """Block index -> (stage, position in the stage), both from 0."""
    for stage, count in enumerate(stages):
        if index < count:
            return stage, index
        index -= count
    raise AssertionError("block index beyond the last stage")
