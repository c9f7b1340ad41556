"""Reward and advantage (Wu et al. 2018, Eqn. 3 and 6)."""

from __future__ import annotations

from torch import Tensor

from bdexport.config import RewardKind
from bdexport.parts import KEEP_THRESHOLD
from bdexport.train.distributed import ALONE, World


def reward(logits: Tensor, labels: Tensor, masks: Tensor, wrong_prediction_penalty: float, kind: RewardKind) -> Tensor:
    """R(u) per image, float32 (N,), for logits (N, C), labels (N,), masks u bool (N, K) or gates u float (N, K).

    ``correct`` (Eqn. 3): ``1 - (|u|/K)^2`` if the prediction is correct, else ``-gamma``.
    ``probability``: the expectation of that when the class is drawn from the softmax,
    ``p (1 - (|u|/K)^2) - (1 - p) gamma`` with p the probability of the true class: the same optimum for a confident
    network, and a gradient also where a block changes the confidence but not yet the decision. It is differentiable in
    logits and gates.
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


def budget_loss(probabilities: Tensor, target_blocks: float, world: World = ALONE) -> Tensor:
    """Squared distance between the share of blocks that greedy masks keep and ``target_blocks`` / K; a scalar.

    ``probabilities`` (N, K). Its value is that of the greedy masks, its gradient that of the mean keep-probability
    (straight-through). It binds the mean over the batch alone: which image keeps what is left to the reward.
    """
    greedy = (probabilities.detach() >= KEEP_THRESHOLD).float()
    usage = world.batch_mean((probabilities + (greedy - probabilities).detach()).mean())
    return (usage - target_blocks / probabilities.shape[1]) ** 2
