"""The nested estimator: one uniform draw decides all blocks of an image, so that the expected reward is a short sum.

BlockDrop draws every block on its own (Wu et al. 2018, Eqn. 1). With one u ~ U(0, 1) per image and ``mask_k = u < p_k``
each block is kept with the same probability p_k, but the masks of an image are nested: they keep its j most probable
blocks, j = 0..K. With p sorted to p_(1) >= .. >= p_(K) the expected reward is then a sum over K + 1 masks,

    E[R] = R(0) + sum_j p_(j) (R(j) - R(j - 1)),        R(j): the reward of keeping the j most probable blocks,

which is the Lovasz extension of R (Lovasz, "Submodular functions and convexity", 1983; on learning with it: Bach,
"Learning with submodular functions", 2013). Its gradient is exact, without sampling noise, and compares what decides
whether a policy depends on the image: few blocks against many. R is run at a few *cuts* j; in between it is taken as
linear. Inference does not change: p >= 0.5 is the mask at u = 0.5.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def most_probable(probabilities: Tensor, kept: Tensor) -> Tensor:
    """Masks bool (N, K) that keep each image's ``kept`` (N,) most probable blocks of ``probabilities`` (N, K)."""
    place = probabilities.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return place < kept[:, None]


def importance(order: list[int], device: torch.device | str) -> Tensor:
    """Places (K,) of blocks that are listed from the least to the most important one. Not to be written to."""
    return _importance(tuple(order), torch.device(device))


@lru_cache(maxsize=16)  # the same in every step, several times: a GPU would wait for each copy
def _importance(order: tuple[int, ...], device: torch.device) -> Tensor:
    places = torch.empty(len(order))
    places[list(order)] = torch.arange(len(order)).float()
    return places.to(device)


def cut_points(num_blocks: int, closed: int, count: int, generator: torch.Generator) -> list[int]:
    """``count`` numbers of kept blocks, ascending: the fewest and the most that can be kept, and random ones between.

    ``closed`` blocks are always kept, and nothing is learned from keeping no block at all, so that the fewest are
    max(1, closed).
    """
    low = max(1, closed)
    between = torch.randperm(max(0, num_blocks - low - 1), generator=generator, device=generator.device)
    inner = (between[: max(0, count - 2)] + low + 1).tolist()
    return sorted({low, *inner, num_blocks})


def expected_reward(probabilities: Tensor, rewards: Tensor, cuts: list[int]) -> Tensor:
    """E[R] per image up to a constant, (N,), differentiable in ``probabilities`` (N, K).

    ``rewards`` (N, J) belong to the masks of :func:`most_probable` with ``cuts`` (J ascending numbers) blocks.
    """
    ordered = probabilities.sort(dim=1, descending=True, stable=True).values
    gains = torch.zeros_like(ordered)
    for index in range(1, len(cuts)):
        low, high = cuts[index - 1], cuts[index]
        gains[:, low:high] = ((rewards[:, index] - rewards[:, index - 1]) / (high - low))[:, None]
    return (ordered * gains).sum(dim=1)
