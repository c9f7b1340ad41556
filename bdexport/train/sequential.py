"""BlockDrop-seq's phases: BlockDrop's reward, advantages and schedules with decisions between the blocks.

What changes is that a probability depends on the decisions before it. The log-probability of a sampled mask is
therefore summed over its own path, and the greedy baseline walks a path of its own. The budget and the entropy bonus
are taken on the greedy path: what they are to bind is what inference will do.

What needs all probabilities of an image before its first block runs does not exist here: the nested and the marginal
estimator and ``finetune.level_share`` (:func:`check_sequential`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bdexport.config import Estimator, TrainConfig
from bdexport.errors import UsageError
from bdexport.models.sequential import Decide, SequentialGates, Walk, greedy
from bdexport.train import rollout
from bdexport.train.data import Batch, TrainingData
from bdexport.train.phases import Curriculum, Finetune, PolicyPhase, accuracy
from bdexport.train.reward import leave_one_out_advantage

REFUSED_ESTIMATORS: dict[Estimator, str] = {
    "nested": "which orders all blocks of an image before one runs",
    "marginal": "which orders all blocks of an image before one runs",
    "gumbel": "whose gates are a policy network's",
}


def check_sequential(config: TrainConfig) -> None:
    """Refuse settings that need a decision on all blocks at once. Raises :class:`UsageError`."""
    if config.policy.estimator in REFUSED_ESTIMATORS:
        raise UsageError(
            "estimator of --method sequential",
            got=f"{config.policy.estimator}, {REFUSED_ESTIMATORS[config.policy.estimator]}",
            expected="self_critical or leave_one_out",
        )
    if config.policy.learns == "head":
        raise UsageError(
            "policy.learns of --method sequential", got="head", expected="all: gates have no backbone of their own"
        )
    if config.finetune.level_share > 0:
        raise UsageError(
            "finetune.level_share of --method sequential",
            got=config.finetune.level_share,
            expected="0: which blocks are the most probable is not known before the last one",
        )


class SequentialPhase(PolicyPhase):
    """What both phases share: walks through the network, and the policy loss over them."""

    def decider(self) -> SequentialGates:
        gates = self.setting.model.gates
        assert isinstance(gates, SequentialGates)
        return gates

    def _sampled_walk(self, images: Tensor, forced: int = 0, learn_network: bool = False) -> Walk:
        """Decisions drawn from the bounded probabilities; the first ``forced`` images run every block."""
        draws = self.setting.rand(len(images), self.setting.num_blocks)

        def decide(index: int, p: Tensor) -> Tensor:
            keep = draws[:, index] < rollout.bounded(p, self.exploration_bound)
            keep[:forced] = True
            return keep

        return self._walk(images, decide, learn_network)

    def _greedy_walk(self, images: Tensor) -> Walk:
        """The path that inference would take."""
        return self._walk(images, greedy)

    def _walk(self, images: Tensor, decide: Decide, learn_network: bool = False) -> Walk:
        """A walk that keeps the blocks which the curriculum has not opened.

        Only the one that the network learns from may leave a trace in the batch-norm statistics.
        """
        network, closed = self.setting.model.network, self.setting.num_blocks - self.now_open

        def held(index: int, p: Tensor) -> Tensor:
            return torch.ones_like(p, dtype=torch.bool) if index < closed else decide(index, p)

        training = network.training
        network.train(training and learn_network)
        with self.setting.autocast():
            walk = self.decider().walk(network, images, held, learn_network)
        network.train(training)
        return walk

    def _walks_loss(self, walks: list[Walk], best: Walk, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (S, N) of sampled ``walks`` and the policy loss (Eqn. 6); ``best`` is the greedy walk."""
        rewards = torch.stack([self._rewards(walk.logits, labels, walk.masks) for walk in walks])
        if self.setting.config.policy.estimator == "leave_one_out":
            advantages = leave_one_out_advantage(rewards)
        else:
            advantages = rewards - self._rewards(best.logits, labels, best.masks)
        sampled_from = rollout.bounded(torch.stack([walk.probabilities for walk in walks]), self.exploration_bound)
        masks = torch.stack([walk.masks for walk in walks])
        gain = advantages * rollout.log_probability(sampled_from, masks, self.now_open)
        return rewards, self._regularised(-gain.mean(), best.probabilities)


class SequentialCurriculum(SequentialPhase, Curriculum):
    """Algorithm 1, lines 3-13, with gates instead of the policy network."""

    def begin(self, data: TrainingData, note: Callable[[str], None]) -> None:
        config = self.setting.config.policy
        if config.order_images == 0:
            return
        order = self.setting.order or self._drop_order(data.train, config.order_images)
        note(f"blocks in the order of backward elimination on {config.order_images} training images: {order}")
        low, high = config.initial_keep_logit - config.order_spread, config.initial_keep_logit + config.order_spread
        for index, logit in zip(order, torch.linspace(low, high, len(order)).tolist(), strict=True):
            self.decider().start_from(logit, index)

    def step(self, batch: Batch) -> dict[str, float]:
        images, labels, _ = batch
        walks = [self._sampled_walk(images) for _ in range(self.setting.config.policy.samples)]
        best = self._greedy_walk(images)
        rewards, loss = self._walks_loss(walks, best, labels)
        self._learn(loss)
        used = best.masks.float().sum(dim=1).mean().item()
        return {"loss": loss.item(), "reward": rewards.mean().item(), "blocks_used": used}


class SequentialFinetune(SequentialPhase, Finetune):
    """Algorithm 1, lines 14-16, with gates instead of the policy network."""

    def step(self, batch: Batch) -> dict[str, float]:
        config = self.setting.config
        images, labels, _ = batch
        # As in Finetune: images that run every block, images on which only the network learns, and the judged ones.
        whole = int(config.finetune.full_share * len(images))
        judged = slice(len(images) - max(1, int(config.finetune.policy_share * (len(images) - whole))), len(images))
        first = self._sampled_walk(images, forced=whole, learn_network=True)
        loss = self._classification_loss(first.logits, batch)
        walks = [Walk(first.logits[judged], first.masks[judged], first.probabilities[judged])]
        walks += [self._sampled_walk(images[judged]) for _ in range(config.policy.samples - 1)]
        best = self._greedy_walk(images[judged])
        rewards, policy_loss = self._walks_loss(walks, best, labels[judged])
        self._learn(loss, policy_loss)
        return {
            "loss": loss.item(),
            "reward": rewards.mean().item(),
            "accuracy": accuracy(first.logits, labels),
            "blocks_used": best.masks.float().sum(dim=1).mean().item(),
        }
