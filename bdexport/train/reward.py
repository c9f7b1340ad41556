"""Reward and advantage (Wu et al. 2018, Eqn. 3 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from bdexport.config import RewardKind


def reward(logits: Tensor, labels: Tensor, masks: Tensor, wrong_prediction_penalty: float, kind: RewardKind) -> Tensor:
    """R(u) per image, float32 (N,), for logits (N, C), labels (N,), masks u bool (N, K).

    ``correct`` (Eqn. 3): ``1 - (|u|/K)^2`` if the prediction is correct, else ``-gamma``.
    ``probability``: the expectation of that when the class is drawn from the softmax,
    ``p (1 - (|u|/K)^2) - (1 - p) gamma`` with p the probability of the true class: the same optimum for a confident
    network, and a gradient also where a block changes the confidence but not yet the decision.
    """
    saved = 1.0 - masks.float().mean(dim=1) ** 2
    if kind == "correct":
        success = (logits.argmax(dim=1) == labels).float()
    else:
        success = logits.float().softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    return success * saved - (1.0 - success) * wrong_prediction_penalty


def leave_one_out_advantage(rewards: Tensor) -> Tensor:
    """Each sample's reward minus the mean of the image's other samples, (S, N) -> (S, N); S >= 2.

    Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (2019).
    """
    samples = len(rewards)
    others = (rewards.sum(dim=0, keepdim=True) - rewards) / (samples - 1)
    return rewards - others


class PenaltyController:
    """Steers gamma so that the mean block usage meets a target: an integral controller on log gamma.

    With fewer blocks used than wanted, wrong predictions cost more, and the other way round. Without a target, gamma
    stays what it is.
    """

    LOW, HIGH = 0.02, 50.0

    def __init__(self, penalty: float, target_blocks: float | None, gain: float) -> None:
        self.penalty, self.target_blocks, self.gain = penalty, target_blocks, gain

    def update(self, blocks_used: float, num_blocks: int) -> None:
        """Take in the mean number of kept blocks of one step."""
        if self.target_blocks is None:
            return
        factor = torch.tensor(self.gain * (self.target_blocks - blocks_used) / num_blocks).exp().item()
        self.penalty = min(self.HIGH, max(self.LOW, self.penalty * factor))
