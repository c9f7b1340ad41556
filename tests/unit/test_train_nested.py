"""The nested estimator and what goes with it: masks of the most probable blocks, the exact expected reward."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from bdexport.errors import UsageError
from bdexport.train.nested import cut_points, expected_reward, most_probable
from bdexport.train.phases import levels_from_text, start_in_order


def reward_of(masks: torch.Tensor) -> torch.Tensor:
    """Some reward that is not additive in the blocks."""
    weights = torch.tensor([0.3, -0.2, 0.5, 0.1, 0.4])
    kept = masks.float()
    return kept @ weights - 0.1 * kept.sum(dim=1) ** 2 + 0.2 * kept[:, 0] * kept[:, 3]


def test_masks_are_nested_and_hold_the_most_probable() -> None:
    """Oracle: by hand for one image; for random ones, sizes and inclusion."""
    p = torch.tensor([[0.2, 0.9, 0.5, 0.7]])
    assert most_probable(p, torch.tensor([2])).tolist() == [[False, True, False, True]]
    p = torch.rand(20, 6)
    previous = torch.zeros(20, 6, dtype=torch.bool)
    for kept in range(7):
        masks = most_probable(p, torch.full((20,), kept))
        assert (masks.sum(dim=1) == kept).all()
        assert not (previous & ~masks).any()
        previous = masks


def test_expected_reward_is_that_of_one_draw_per_image() -> None:
    """Oracle: the mean over 20,000 draws u of the reward of ``u < p``, within five standard errors."""
    p = torch.tensor([[0.15, 0.8, 0.55, 0.3, 0.9]])
    rewards = torch.stack([reward_of(most_probable(p, torch.tensor([j]))) for j in range(6)], dim=1)
    exact = rewards[:, 0] + expected_reward(p, rewards, list(range(6)))
    drawn = reward_of(torch.rand(20_000, 1) < p)
    error = drawn.std().item() / 20_000**0.5
    assert exact.item() == pytest.approx(drawn.mean().item(), abs=5 * error)


def test_gradient_is_each_blocks_marginal_reward() -> None:
    """Oracle: R(j) - R(j - 1) of the block at place j."""
    p = torch.tensor([[0.15, 0.8, 0.55, 0.3, 0.9]], requires_grad=True)
    rewards = torch.stack([reward_of(most_probable(p.detach(), torch.tensor([j]))) for j in range(6)], dim=1)
    expected_reward(p, rewards, list(range(6))).sum().backward()  # type: ignore[no-untyped-call]
    marginal = (rewards[:, 1:] - rewards[:, :-1])[0]
    place = p.detach().argsort(dim=1, descending=True).argsort(dim=1)[0]
    assert p.grad is not None
    assert torch.allclose(p.grad[0], marginal[place], atol=1e-6)


def test_between_cuts_rewards_are_linear() -> None:
    """Oracle: rewards that are linear in the number of blocks give the same with few cuts as with all."""
    p = torch.rand(8, 10)
    slope = torch.rand(8, 1)
    everywhere = slope * torch.arange(1, 11)
    few = [1, 4, 10]
    dense = expected_reward(p, everywhere, list(range(1, 11)))
    sparse = expected_reward(p, slope * torch.tensor(few), few)
    assert torch.allclose(dense, sparse, atol=1e-5)


def test_cuts_reach_from_the_closed_blocks_to_all() -> None:
    """Oracle: properties; ascending, both ends in, as many as asked for where there are so many."""
    generator = torch.Generator().manual_seed(0)
    for closed, count in ((0, 5), (3, 4), (9, 5), (10, 5), (0, 100)):
        cuts = cut_points(10, closed, count, generator)
        assert cuts == sorted(set(cuts))
        assert cuts[0] == max(1, closed)
        assert cuts[-1] == 10
        assert len(cuts) == min(count, 10 - max(1, closed) + 1)


def test_a_policy_in_order_drops_the_first_ones_first() -> None:
    """Oracle: every image ranks the blocks as the given order does."""
    policy = tiny_model(stages=(2, 2)).policy
    start_in_order(policy, [2, 0, 3, 1], center=0.0, spread=2.0)
    with torch.no_grad():
        logits = policy.logits(torch.randn(5, 3, 24, 32))
    assert (logits.argsort(dim=1) == torch.tensor([2, 0, 3, 1])).all()


@pytest.mark.parametrize("text", ["4,8", "15", "3,3", "a", "8,0", ","])
def test_levels_are_block_numbers_most_first(text: str) -> None:
    """Oracle: the rule in the message; K = 8."""
    assert levels_from_text("8, 4,1", 8) == [8, 4, 1]
    assert levels_from_text("", 8) == []
    with pytest.raises(UsageError, match="levels"):
        levels_from_text(text, 8)
