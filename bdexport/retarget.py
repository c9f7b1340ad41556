"""Slide a trained policy along its accuracy/FLOPs frontier: one number added to all of its logits, nothing is trained.

A policy ranks (image, block) pairs; where it draws the line is a choice. Adding the same shift s to every logit keeps
the ranking and moves the mean number of kept blocks, which grows with s. The shift for a wanted mean is a quantile of
the logits on held-out images.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdexport.errors import UsageError
from bdexport.models.pair import BlockDropNet


@torch.no_grad()
def policy_logits(model: BlockDropNet, batches: Iterable[tuple[Tensor, Tensor]]) -> NDArray[np.float32]:
    """The policy's logits (N, K) in float32; the model must be in eval mode."""
    return np.concatenate([model.policy.logits(images).float().cpu().numpy() for images, _ in batches])


def shift_for(logits: NDArray[np.float32], target_blocks: float) -> float:
    """The largest shift with which greedy masks (logit + shift >= 0) keep at most ``target_blocks`` on average.

    ``logits`` (N, K). Raises :class:`UsageError` on a target outside (0, K].
    """
    images, num_blocks = logits.shape
    if not 0 < target_blocks <= num_blocks:
        raise UsageError("target blocks", got=target_blocks, expected=f"above 0, at most {num_blocks}")
    descending = np.sort(logits, axis=None)[::-1]
    allowed = int(np.floor(target_blocks * images + 1e-9))
    if allowed >= len(descending):
        return _above(-float(descending[-1]))
    # Halfway between the last logit that is kept and the first that is not: rounding elsewhere then changes nothing.
    kept, dropped = float(descending[max(0, allowed - 1)]), float(descending[allowed])
    if kept > dropped:
        return -(kept + dropped) / 2
    higher = descending[descending > dropped]  # ties at the line: none of them is kept
    return -(float(higher[-1]) + dropped) / 2 if len(higher) else -_above(dropped)


def _above(value: float) -> float:
    return value + 1e-3 * max(1.0, abs(value))


@torch.no_grad()
def retarget(model: BlockDropNet, logits: NDArray[np.float32], target_blocks: float) -> float:
    """Move the policy's bias in place so that ``logits`` (N, K), its own, meet ``target_blocks``; returns the shift."""
    shift = shift_for(logits, target_blocks)
    model.policy.fc.bias.add_(shift)
    return shift
