"""Filter pruning: the inner convolutions of each block lose their weakest filters (PFEC).

H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, *Pruning Filters for Efficient ConvNets*, ICLR 2017, section 3:
filters with the smallest absolute weight sum go, s_j = sum_l sum |K_l| (3.1), with their feature maps, their batch norm
and the kernels of the next convolution that read them; one ratio for each stage, sensitive blocks skipped (3.2). What
a block gives out is added to its shortcut and keeps its width (3.3), so that pruned and whole blocks fit together and a
policy decides about either. The accuracy is to be regained by finetuning (3.4).

The number of filters removed is rounded up: with that, the FLOPs of the paper's Table 1 come out as published. In a
bottleneck, which the paper does not prune, both inner convolutions are pruned one after the other, the second without
the kernels that the first has lost ("greedy" in 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import Tensor

from bdexport import __version__
from bdexport.architecture import BlockKind, ResNetSpec
from bdexport.checkpoint import Checkpoint
from bdexport.checkpoint.fitting import fit_own
from bdexport.errors import UsageError

INNER: dict[BlockKind, tuple[int, ...]] = {"basic": (1,), "bottleneck": (1, 2)}  # convolutions whose filters can go
NORM = ("weight", "bias", "running_mean", "running_var")
STILL_TRUE = ("policy_statistics", "fixed_mask")  # of a training record: the masks do not depend on the network


def prune_checkpoint(ckpt: Checkpoint, ratios: Sequence[float], skip: Collection[int], base: str) -> Checkpoint:
    """``ckpt`` with ``ratios[stage]`` of the inner filters of each block removed, but for the blocks in ``skip``.

    A policy stays as it is, and so do its masks; gates stay too, but decide on what the pruned blocks give out.
    ``base``: what to call ``ckpt`` in the training record. Raises :class:`UsageError` for ratios or blocks that make no
    sense, and where no filter would go or none would stay; CheckpointError when the tensors do not fit the specs.
    """
    widths = pruned_widths(ckpt.network, ratios, skip)
    state = fit_own(ckpt.state, ckpt.network, ckpt.policy, base, ckpt.gates)
    for block, kept in zip(ckpt.network.blocks(), widths, strict=True):
        if kept < block.channels:
            _prune_branch(state, f"network.blocks.{block.index}.branch", block.kind, kept)
    training = {
        "bdexport": __version__,
        "base": base,
        "pruned": {"criterion": "l1", "ratios": list(ratios), "skipped": sorted(skip), "inner_widths": list(widths)},
        "base_training": {name: value for name, value in ckpt.training.items() if name not in STILL_TRUE},
    } | {name: ckpt.training[name] for name in STILL_TRUE if name in ckpt.training}
    network = replace(ckpt.network, inner_widths=widths)
    return replace(ckpt, network=network, state=state, training=training, form="bdexport", sha256=None)


def pruned_widths(network: ResNetSpec, ratios: Sequence[float], skip: Collection[int]) -> tuple[int, ...]:
    """Inner filters that stay, block by block. Raises :class:`UsageError` as :func:`prune_checkpoint`."""
    if len(ratios) != len(network.stages):
        raise UsageError("pruning ratios", got=len(ratios), expected=f"{len(network.stages)}, one for each stage")
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise UsageError("pruning ratio", got=ratio, expected="at least 0, below 1")
    unknown = sorted(index for index in skip if not 0 <= index < network.num_blocks)
    if unknown:
        raise UsageError("blocks to skip", got=unknown, expected=f"numbers in 0..{network.num_blocks - 1}")
    stage_ratios = [ratio for count, ratio in zip(network.stages, ratios, strict=True) for _ in range(count)]
    widths = []
    for block, ratio in zip(network.blocks(), stage_ratios, strict=True):
        removed = 0 if block.index in skip else math.ceil(ratio * block.channels - 1e-9)  # 0.1 of 10 is 1, not 2
        widths.append(block.channels - removed)
        if widths[-1] == 0:
            raise UsageError(
                f"block {block.index}: nothing left",
                got=f"{ratio:g} of {block.channels} filters to remove, rounded up",
                remedy=f"prune less, or skip block {block.index}",
            )
    if widths == [block.channels for block in network.blocks()]:
        raise UsageError("no filter would be removed", remedy="raise a ratio, or skip fewer blocks")
    return tuple(widths)


def strongest_filters(weight: Tensor, kept: int) -> Tensor:
    """Indices, ascending, of the ``kept`` filters of (out, in, h, w) with the largest L1 norm; of equals, the first."""
    norms = weight.double().abs().flatten(1).sum(dim=1)
    return norms.argsort(descending=True, stable=True)[:kept].sort().values


def _prune_branch(state: dict[str, Tensor], branch: str, kind: BlockKind, kept: int) -> None:
    """Replace one branch's tensors in ``state``: ``kept`` filters in each inner convolution."""
    for number in INNER[kind]:
        conv, following = f"{branch}.conv{number}.weight", f"{branch}.conv{number + 1}.weight"
        filters = strongest_filters(state[conv], kept)
        for name in (conv, *(f"{branch}.bn{number}.{leaf}" for leaf in NORM)):
            state[name] = state[name][filters]
        state[following] = state[following][:, filters]
