"""From policy outputs to masks and their log-probability (Wu et al. 2018, Eqn. 1, 2 and section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from bdexport.parts import KEEP_THRESHOLD
from bdexport.train.distributed import ALONE, World


def open_blocks(epoch: int, num_blocks: int, blocks_per_epoch: int) -> int:
    """How many of the last blocks the policy decides in ``epoch`` (0, 1, ..): t in Algorithm 1, at most K."""
    return min(num_blocks, (epoch + 1) * blocks_per_epoch)


def bounded(probabilities: Tensor, exploration_bound: float) -> Tensor:
    """``alpha s + (1 - alpha)(1 - s)``: keeps every decision at least ``1 - alpha`` open while sampling."""
    return exploration_bound * probabilities + (1.0 - exploration_bound) * (1.0 - probabilities)


def force_closed(masks: Tensor, opened: int) -> Tensor:
    """Keep the leading K - ``opened`` blocks, which the curriculum does not decide yet; bool (N, K)."""
    closed = masks.shape[-1] - opened
    if closed == 0:
        return masks
    masks = masks.clone()
    masks[..., :closed] = True
    return masks


def sample_masks(
    probabilities: Tensor, opened: int, samples: int, generator: torch.Generator, world: World = ALONE
) -> Tensor:
    """Draw bool (S, N, K) from Bernoulli(probabilities (N, K)), closed blocks kept."""
    uniform = world.rand((samples, *probabilities.shape), generator, rows=1)
    return force_closed(uniform < probabilities.detach(), opened)


def greedy_masks(probabilities: Tensor, opened: int) -> Tensor:
    """The masks that inference would run, closed blocks kept; bool (N, K)."""
    return force_closed(probabilities.detach() >= KEEP_THRESHOLD, opened)


def log_probability(probabilities: Tensor, masks: Tensor, opened: int) -> Tensor:
    """log pi(u | x) over the open blocks only, (.., N): closed blocks were not chosen by the policy."""
    chosen = torch.where(masks, probabilities, 1.0 - probabilities).clamp_min(1e-6)
    closed = masks.shape[-1] - opened
    return chosen[..., closed:].log().sum(dim=-1)


def entropy(probabilities: Tensor, opened: int) -> Tensor:
    """Bernoulli entropy in nats, mean over images and open blocks; a scalar."""
    p = probabilities[..., probabilities.shape[-1] - opened :].clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()
