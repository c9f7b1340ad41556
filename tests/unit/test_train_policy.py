"""Reward, advantage, masks and their log-probability: the equations of Wu et al. 2018."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli

from bdexport.train import rollout
from bdexport.train.reward import budget_loss, leave_one_out_advantage, reward


def test_reward_is_equation_3() -> None:
    """Oracle: by hand; K = 4, one right with 2 blocks, one wrong with 4, one right with none."""
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    labels = torch.tensor([0, 1, 1])
    masks = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    assert reward(logits, labels, masks, 3.0, "correct").tolist() == [0.75, -3.0, 1.0]


def test_probability_reward_is_the_expectation() -> None:
    """Oracle: the mean of the 0/1 reward over the class drawn from the softmax, summed by hand."""
    logits, labels = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([1])
    masks = torch.tensor([[True, False]])
    p = logits.softmax(1)[0, 1].item()
    expected = p * 0.75 + (1 - p) * -2.0
    assert reward(logits, labels, masks, 2.0, "probability").item() == pytest.approx(expected)


def test_leave_one_out() -> None:
    """Oracle: by hand; advantages of an image's samples sum to zero."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 3.0]])
    advantages = leave_one_out_advantage(rewards)
    assert advantages[:, 0].tolist() == [1.5, 0.0, -1.5]
    assert torch.allclose(advantages.sum(dim=0), torch.zeros(2), atol=1e-6)


def test_curriculum_opens_the_last_blocks_first() -> None:
    """Oracle: Algorithm 1, ``s[1:K-t] = 1``: in epoch t (from 1) the last t blocks are decided."""
    assert [rollout.open_blocks(epoch, 5, 1) for epoch in range(7)] == [1, 2, 3, 4, 5, 5, 5]
    masks = rollout.force_closed(torch.zeros(1, 5, dtype=torch.bool), opened=2)
    assert masks.tolist() == [[True, True, True, False, False]]


def test_bound_keeps_decisions_open() -> None:
    """Oracle: alpha s + (1 - alpha)(1 - s) at s = 0, 1/2, 1."""
    s = torch.tensor([0.0, 0.5, 1.0])
    assert rollout.bounded(s, 0.8).tolist() == pytest.approx([0.2, 0.5, 0.8])


def test_log_probability_is_bernoullis_over_open_blocks() -> None:
    """Oracle: torch.distributions, summed over the open blocks only."""
    probabilities, masks = torch.rand(6, 5), torch.rand(3, 6, 5) < 0.5
    expected = Bernoulli(probabilities).log_prob(masks.float())[..., 2:].sum(-1)  # type: ignore[no-untyped-call]
    assert torch.allclose(rollout.log_probability(probabilities, masks, opened=3), expected, atol=1e-5)


def test_closed_blocks_get_no_gradient() -> None:
    """Oracle: the derivative of the log-probability by closed blocks' outputs is zero."""
    probabilities = torch.full((2, 5), 0.4, requires_grad=True)
    masks = rollout.force_closed(torch.zeros(1, 2, 5, dtype=torch.bool), 2)
    rollout.log_probability(probabilities, masks, 2).sum().backward()  # type: ignore[no-untyped-call]
    assert probabilities.grad is not None
    assert probabilities.grad[:, :3].abs().sum() == 0
    assert (probabilities.grad[:, 3:] != 0).all()


def test_samples_follow_their_probabilities() -> None:
    """Oracle: the law of large numbers, within five standard errors; closed blocks are always kept."""
    probabilities = torch.tensor([[0.2, 0.2, 0.9]]).expand(4000, -1)
    masks = rollout.sample_masks(probabilities, 2, 1, torch.Generator().manual_seed(0))[0]
    assert masks[:, 0].all()
    rates = masks.float().mean(dim=0)
    for rate, p in zip(rates[1:].tolist(), (0.2, 0.9), strict=True):
        assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_greedy_threshold_is_inclusive() -> None:
    """Oracle: keep when p >= 0.5."""
    assert rollout.greedy_masks(torch.tensor([[0.5, 0.4999]]), 2).tolist() == [[True, False]]


def test_entropy() -> None:
    """Oracle: torch.distributions over the open blocks."""
    probabilities = torch.tensor([[0.1, 0.3, 0.8]])
    expected = Bernoulli(probabilities[:, 1:]).entropy().mean()  # type: ignore[no-untyped-call]
    assert rollout.entropy(probabilities, 2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_budget_binds_the_mean_of_greedy_masks() -> None:
    """Oracle: by hand; 3 of 8 decisions are kept, the target is half, and the gradient pushes all towards keep."""
    probabilities = torch.tensor([[0.9, 0.4, 0.3, 0.2], [0.5, 0.8, 0.1, 0.4]], requires_grad=True)
    loss = budget_loss(probabilities, target_blocks=2.0)
    assert loss.item() == pytest.approx((3 / 8 - 1 / 2) ** 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert probabilities.grad is not None
    assert torch.allclose(probabilities.grad, torch.full((2, 4), 2 * (3 / 8 - 1 / 2) / 8))
