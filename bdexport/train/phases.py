"""The phases of a run: pretrain, adapt, curriculum, finetune. Each knows its parameters, its schedule and one step.

All phases share one shape, so that the loop (:mod:`bdexport.train.loop`) treats them alike: ``start`` prepares modules
and optimisers, ``at`` sets what depends on progress, ``step`` learns from one batch and returns figures to average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from bdexport.config import AdaptConfig, Optimiser, PretrainConfig, TrainConfig
from bdexport.errors import DivergedError
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import ResNet
from bdexport.train import rollout
from bdexport.train.data import Batch
from bdexport.train.distributed import ALONE, World
from bdexport.train.reward import budget_loss, leave_one_out_advantage, reward


@dataclass
class Setting:
    """What every phase works on.

    ``teacher`` is the frozen, undropped base network, or None; ``teacher_logits`` are its outputs (N, C) for the
    training images as they are, where they are cached. ``world``: which shard of each batch this process sees; what is
    random per image is drawn with :meth:`rand`, what is not linear in a mean over the batch takes ``world.batch_mean``.
    """

    model: BlockDropNet
    teacher: ResNet | None
    teacher_logits: Tensor | None
    config: TrainConfig
    device: str
    bf16: bool
    generator: torch.Generator
    world: World = ALONE

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.model.network.blocks)

    def rand(self, *shape: int, rows: int = 0) -> Tensor:
        """Uniform numbers, float32; dimension ``rows`` counts the images that this process sees."""
        return self.world.rand(shape, self.generator, rows)

    def autocast(self) -> torch.autocast:
        """bf16 where the run uses it."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)


class Phase:
    """Common parts of all phases."""

    name = ""
    epochs = 0
    batch = 128
    share = 1.0
    uses_policy = False
    learns_network = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.optimisers: list[Optimizer] = []
        self.peak_rates: list[float] = []
        self.warmup_epochs = 0.0

    def start(self) -> None:
        """Prepare modules and optimisers; called once per run of the phase, also on resuming."""
        raise NotImplementedError

    def opened(self, epoch: int) -> int:
        """How many of the last blocks the policy decides in this epoch."""
        return self.setting.num_blocks

    def at(self, epoch: float) -> None:
        """Set learning rates (and whatever else depends on progress) for a moment, in epochs from the phase's start."""
        for optimiser, peak in zip(self.optimisers, self.peak_rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * self.rate_factor(epoch)

    def rate_factor(self, epoch: float) -> float:
        """Linear warm-up, then cosine decay to zero."""
        if epoch < self.warmup_epochs:
            return (epoch + 1e-3) / self.warmup_epochs
        return 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / max(1, self.epochs))))

    def step(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch; returns figures that the loop averages over the epoch."""
        raise NotImplementedError

    def _learn(self, loss: Tensor) -> None:
        world = self.setting.world
        mean = world.mean(loss.detach())  # of the whole batch: all processes must judge alike
        if not torch.isfinite(mean):
            raise DivergedError(f"{self.name}: the loss is {mean.item()}", remedy=self.calmer())
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        world.average_gradients(parameter for group in groups for parameter in group["params"])
        for optimiser in self.optimisers:
            optimiser.step()

    def calmer(self) -> str:
        """What to change when the phase has diverged."""
        group = getattr(self.setting.config, self.name, None)
        rates = [] if group is None else [field.name for field in fields(group) if field.name.endswith("learning_rate")]
        lower = f"--set {self.name}.{rates[0]}={getattr(group, rates[0]) / 3:.2g}" if rates else "a lower learning rate"
        return f"in another --out, try {lower}, or --precision fp32"

    def _classification_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy plus, with a teacher, the softened KL divergence (Hinton et al., 2015)."""
        loss = F.cross_entropy(logits.float(), batch.labels)
        weight, temperature = self.setting.config.distillation_weight, self.setting.config.distillation_temperature
        target = self._taught(batch)
        if target is None or weight == 0:
            return loss
        divergence = F.kl_div(
            F.log_softmax(logits.float() / temperature, dim=1),
            F.log_softmax(target / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return loss + weight * temperature**2 * divergence

    def _taught(self, batch: Batch) -> Tensor | None:
        """The teacher's logits for the batch, (B, C), or None without a teacher."""
        if self.setting.teacher_logits is not None:
            return self.setting.teacher_logits[batch.rows]
        if self.setting.teacher is None:
            return None
        with torch.no_grad(), self.setting.autocast():
            taught: Tensor = self.setting.teacher(batch.images)
        return taught.float()


class NetworkPhase(Phase):
    """What pretrain and adapt share: the network learns by SGD, the policy does not."""

    def __init__(self, setting: Setting, config: PretrainConfig | AdaptConfig) -> None:
        super().__init__(setting)
        self.epochs, self.batch, self.warmup_epochs = config.epochs, config.batch, config.warmup_epochs
        self.peak_rates = [config.learning_rate]
        self._weight_decay = config.weight_decay

    def start(self) -> None:
        _trainable(self.setting.model.network, True)
        _trainable(self.setting.model.policy, False)
        self.optimisers = [_sgd(self.setting.model.network, self.peak_rates[0], self._weight_decay)]


class Pretrain(NetworkPhase):
    """Train the base network itself, every block kept."""

    name = "pretrain"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, setting.config.pretrain)

    def step(self, batch: Batch) -> dict[str, float]:
        images, labels, _ = batch
        with self.setting.autocast():
            logits = self.setting.model.network(images)
        loss = F.cross_entropy(logits.float(), labels)
        self._learn(loss)
        return {"loss": loss.item(), "accuracy": _accuracy(logits, labels)}


class Adapt(NetworkPhase):
    """Stochastic depth: each image runs a mask drawn at a keep rate of its own."""

    name = "adapt"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, setting.config.adapt)

    def step(self, batch: Batch) -> dict[str, float]:
        config, setting = self.setting.config.adapt, self.setting
        images, labels, _ = batch
        span = config.keep_high - config.keep_low
        rates = config.keep_low + span * setting.rand(len(images), 1)
        masks = setting.rand(len(images), setting.num_blocks) < rates
        with setting.autocast():
            logits = setting.model.network.forward_masked(images, masks)
        loss = self._classification_loss(logits, batch)
        self._learn(loss)
        used = masks.float().sum(dim=1).mean().item()
        return {"loss": loss.item(), "accuracy": _accuracy(logits, labels), "blocks_used": used}


class PolicyPhase(Phase):
    """What curriculum and finetuning share: sampling masks and the policy gradient."""

    uses_policy = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.exploration_bound = setting.config.policy.exploration_bound
        self.entropy_weight = setting.config.policy.entropy_bonus
        self.now_open = setting.num_blocks

    def at(self, epoch: float) -> None:
        super().at(epoch)
        self.now_open = self.opened(int(epoch))
        self.entropy_weight = self.setting.config.policy.entropy_bonus * max(0.0, 1 - epoch / max(1, self.epochs))

    def _probabilities(self, images: Tensor) -> Tensor:
        with self.setting.autocast():
            logits = self.setting.model.policy.logits(images)
        return logits.float().sigmoid()

    def _rewards(self, logits: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        config = self.setting.config.policy
        return reward(logits.detach(), labels, masks, config.wrong_prediction_penalty, config.reward)

    @torch.no_grad()
    def _evaluated(self, images: Tensor, masks: Tensor) -> Tensor:
        """Logits under ``masks`` with frozen batch-norm statistics: a baseline must not leave a trace."""
        network = self.setting.model.network
        training = network.training
        network.eval()
        with self.setting.autocast():
            logits = network.forward_masked(images, masks)
        network.train(training)
        return logits

    def _policy_loss(self, probabilities: Tensor, masks: Tensor, advantages: Tensor) -> Tensor:
        """REINFORCE (Eqn. 6) over masks (S, N, K) with advantages (S, N), minus the entropy bonus, plus the budget."""
        sampled_from = rollout.bounded(probabilities, self.exploration_bound)
        log_probability = rollout.log_probability(sampled_from, masks, self.now_open)
        loss = -(advantages * log_probability).mean()
        loss = loss - self.entropy_weight * rollout.entropy(probabilities, self.now_open)
        config = self.setting.config.policy
        # While the curriculum holds blocks, the open ones alone cannot meet the budget and would all be dropped.
        if config.target_blocks is None or self.now_open < self.setting.num_blocks:
            return loss
        return loss + config.budget_weight * budget_loss(probabilities, config.target_blocks, self.setting.world)

    def _sampled(self, probabilities: Tensor) -> Tensor:
        config, setting = self.setting.config.policy, self.setting
        sampled_from = rollout.bounded(probabilities, self.exploration_bound)
        return rollout.sample_masks(sampled_from, self.now_open, config.samples, setting.generator, setting.world)

    def _advantages(
        self, rewards: Tensor, probabilities: Tensor, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advantages (S, N) of sampled rewards (S, N), and the greedy masks (N, K) where they were run."""
        greedy = rollout.greedy_masks(probabilities, self.now_open)
        if self.setting.config.policy.estimator == "leave_one_out":
            return leave_one_out_advantage(rewards), greedy
        baseline = self._rewards(self._evaluated(images, greedy), labels, greedy)
        return rewards - baseline, greedy


class Curriculum(PolicyPhase):
    """Algorithm 1, lines 3-13: the policy learns on the frozen network, opening blocks from the last one."""

    name = "curriculum"
    learns_network = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.curriculum
        self.epochs, self.batch, self.share = config.epochs, config.batch, config.epoch_share

    def start(self) -> None:
        config = self.setting.config.curriculum
        _trainable(self.setting.model.network, False)
        _trainable(self.setting.model.policy, True)
        self.optimisers = [Adam(self.setting.model.policy.parameters(), config.learning_rate)]
        self.peak_rates = [config.learning_rate]

    def opened(self, epoch: int) -> int:
        return rollout.open_blocks(epoch, self.setting.num_blocks, self.setting.config.curriculum.blocks_per_epoch)

    def rate_factor(self, epoch: float) -> float:
        """Constant, as in the paper."""
        return 1.0

    def step(self, batch: Batch) -> dict[str, float]:
        images, labels, _ = batch
        probabilities = self._probabilities(images)
        masks = self._sampled(probabilities)
        rewards = torch.stack([self._rewards(self._evaluated(images, one), labels, one) for one in masks])
        advantages, greedy = self._advantages(rewards, probabilities, images, labels)
        loss = self._policy_loss(probabilities, masks, advantages)
        self._learn(loss)
        used = greedy.float().sum(dim=1).mean().item()
        return {"loss": loss.item(), "reward": rewards.mean().item(), "blocks_used": used}


class Finetune(PolicyPhase):
    """Algorithm 1, lines 14-16: network and policy learn together."""

    name = "finetune"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.finetune
        self.epochs, self.batch, self.warmup_epochs = config.epochs, config.batch, config.warmup_epochs

    def start(self) -> None:
        config, model = self.setting.config.finetune, self.setting.model
        _trainable(model.network, True)
        _trainable(model.policy, True)
        rates = (config.network_learning_rate, config.policy_learning_rate)
        self.optimisers = [
            _optimiser(config.optimiser, model.network, rates[0], config.weight_decay),
            Adam(model.policy.parameters(), rates[1]),
        ]
        self.peak_rates = list(rates)

    def at(self, epoch: float) -> None:
        super().at(epoch)
        config = self.setting.config.policy
        progress = min(1.0, epoch / max(1, self.epochs))
        span = config.finetune_bound_end - config.finetune_bound_start
        self.exploration_bound = config.finetune_bound_start + span * progress

    def rate_factor(self, epoch: float) -> float:
        if self.setting.config.finetune.schedule == "step":
            return 1.0 if epoch < 0.8 * self.epochs else 0.1
        return super().rate_factor(epoch)

    def step(self, batch: Batch) -> dict[str, float]:
        setting, config = self.setting, self.setting.config.finetune
        images, labels, _ = batch
        probabilities = self._probabilities(images)
        masks = self._sampled(probabilities)
        # The batch: images that run every block, images that the policy learns from, and the rest, on which only the
        # network learns. Images that ran every block say nothing about the masks that were drawn for them.
        whole = int(config.full_share * len(images))
        judged = slice(whole, whole + max(1, int(config.policy_share * (len(images) - whole))))
        run = masks[0].clone()
        run[:whole] = True
        with setting.autocast():
            logits = setting.model.network.forward_masked(images, run)
        loss = self._classification_loss(logits, batch)
        rewards, policy_loss = self._judge(
            logits[judged], images[judged], labels[judged], probabilities[judged], masks[:, judged]
        )
        self._learn(loss + policy_loss)
        used = rollout.greedy_masks(probabilities, self.now_open).float().sum(dim=1).mean().item()
        return {
            "loss": loss.item(),
            "reward": rewards.mean().item(),
            "accuracy": _accuracy(logits, labels),
            "blocks_used": used,
        }

    def _judge(
        self, logits: Tensor, images: Tensor, labels: Tensor, probabilities: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rewards (S, N) and the policy loss; ``logits`` (N, C) belong to the first of the masks (S, N, K)."""
        others = [self._rewards(self._evaluated(images, one), labels, one) for one in masks[1:]]
        rewards = torch.stack([self._rewards(logits, labels, masks[0]), *others])
        advantages, _ = self._advantages(rewards, probabilities, images, labels)
        return rewards, self._policy_loss(probabilities, masks, advantages)


PHASES: tuple[type[Phase], ...] = (Pretrain, Adapt, Curriculum, Finetune)


def _trainable(module: nn.Module, trainable: bool) -> None:
    """Train mode with gradients, or eval mode (fixed batch-norm statistics) without."""
    module.train(trainable)
    module.requires_grad_(trainable)


def _decayed(module: nn.Module) -> Iterable[dict[str, object]]:
    """Weight decay on convolutions and linear weights only: batch norm and biases are not shrunk."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def _sgd(module: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    return SGD(_decayed(module), learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def _optimiser(kind: Optimiser, module: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    if kind == "sgd":
        return _sgd(module, learning_rate, weight_decay)
    return Adam(_decayed(module), learning_rate, weight_decay=weight_decay)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * (logits.argmax(dim=1) == labels).float().mean().item()
