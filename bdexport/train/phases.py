"""The phases of a run: pretrain, prime, adapt, curriculum, finetune. Each knows its parameters, schedule and one step.

All phases share one shape, so that the loop (:mod:`bdexport.train.loop`) treats them alike: ``start`` prepares modules
and optimisers, ``at`` sets what depends on progress, ``step`` learns from one batch and returns figures to average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from bdexport.config import AdaptConfig, Optimiser, PretrainConfig, TrainConfig
from bdexport.errors import DivergedError, UsageError
from bdexport.evaluate import Strategy, fixed_strategy, keep_all
from bdexport.mask_search import drop_order
from bdexport.models.pair import BlockDropNet
from bdexport.models.policy import PolicyNet
from bdexport.models.resnet import ResNet
from bdexport.parts import mask_to_text
from bdexport.train import advice, gumbel, nested, rollout
from bdexport.train.data import Batch, DeviceImages, TrainingData
from bdexport.train.distributed import ALONE, World
from bdexport.train.reward import budget_loss, leave_one_out_advantage, reward


@dataclass
class Setting:
    """What every phase works on.

    ``teachers`` are frozen, undropped networks whose logits are averaged (the base itself, or others that were asked
    for), or none; ``teacher_logits`` are their outputs (N, C) for the training images as they are, where cached.
    ``world``: which shard of each batch this process sees; what is random per image is drawn with :meth:`rand` or
    :meth:`randint`, what is not linear in a mean over the batch takes ``world.batch_mean``.
    """

    model: BlockDropNet
    teachers: list[ResNet]
    teacher_logits: Tensor | None
    config: TrainConfig
    device: str
    bf16: bool
    generator: torch.Generator
    world: World = ALONE
    # From the policy's features to classes: the policy's backbone learns through it, and it is thrown away at the end.
    classifier: nn.Linear = field(init=False)
    critic: nn.Sequential = field(init=False)  # of the marginal estimator: features -> success at each level, log-odds
    memory: tuple[Tensor, Tensor] | None = None  # .. judged images: features (M, F), success (M, L)
    price: float = 0.0  # .. and what a block costs, in points of accuracy
    order: list[int] | None = None  # blocks from the least to the most important, once it is known
    fixed_mask: str | None = None  # method fixed: what :func:`bdexport.evaluate.fixed_strategy` takes, once it is known

    def __post_init__(self) -> None:
        features = self.model.policy.spec.widths[-1]
        self.classifier = nn.Linear(features, self.model.network.spec.num_classes).to(self.device)
        levels = levels_from_text(self.config.adapt.levels, self.num_blocks)
        self.critic = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, max(1, len(levels))))
        self.critic.to(self.device)

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.model.network.blocks)

    def rand(self, *shape: int, rows: int = 0) -> Tensor:
        """Uniform numbers, float32; dimension ``rows`` counts the images that this process sees."""
        return self.world.rand(shape, self.generator, rows)

    def randint(self, low: int, high: int, images: int) -> Tensor:
        """A whole number from ``low`` to ``high`` - 1 for each of the images that this process sees."""
        return self.world.randint(low, high, images, self.generator)

    def fixed_strategy(self) -> tuple[str, Strategy]:
        """The title and the masks of :attr:`fixed_mask`, for the images that this process sees."""
        assert self.fixed_mask is not None  # the phase that needs it has begun
        config = self.config
        return fixed_strategy(self.fixed_mask, config.fixed.kept, config.seed, self.model, self.world.places)

    def autocast(self) -> torch.autocast:
        """bf16 where the run uses it."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)


class Phase:
    """Common parts of all phases."""

    name = ""
    settings = ""  # the group that its learning rates come from, where that is not called like the phase
    epochs = 0
    batch = 128
    share = 1.0
    uses_policy = False
    learns_network = True
    decisive = False  # the best model of the run is chosen among this phase's epochs
    takes_last = False  # .. by time: the last epoch's is the best

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.optimisers: list[Optimizer] = []
        self.peak_rates: list[float] = []
        self.warmup_epochs = 0.0

    def start(self) -> None:
        """Prepare modules and optimisers; called once per run of the phase, also on resuming."""
        raise NotImplementedError

    def strategy(self) -> Strategy | None:
        """The masks under which the model is validated after each epoch; None: what the model itself decides."""
        return None if self.uses_policy else keep_all(self.setting.num_blocks)

    def begin(self, data: TrainingData, note: Callable[[str], None]) -> None:
        """What happens once, before the first epoch, and not on resuming: nothing, for most phases."""

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

    def _drop_order(self, images: DeviceImages, count: int) -> list[int]:
        """Blocks in the order of :func:`bdexport.mask_search.drop_order` on the first ``count`` images."""
        network = self.setting.model.network.eval()
        with self.setting.autocast():
            return self.setting.world.once(lambda: drop_order(network, list(images.batches(250, count))))

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

    def calmer(self, part: str = "network") -> str:
        """What to change when ``part`` (network, policy or gates) has diverged."""
        return advice.calmer(self.setting.config, self.settings or self.name, part, self.setting.bf16)

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
        if not self.setting.teachers:
            return None
        with torch.no_grad(), self.setting.autocast():
            return torch.stack([teacher(batch.images).float() for teacher in self.setting.teachers]).mean(dim=0)


class NetworkPhase(Phase):
    """What pretrain and adapt share: the network learns by SGD, the policy does not."""

    def __init__(self, setting: Setting, config: PretrainConfig | AdaptConfig) -> None:
        super().__init__(setting)
        self.epochs, self.batch, self.warmup_epochs = config.epochs, config.batch, config.warmup_epochs
        self.peak_rates = [config.learning_rate]
        self._weight_decay = config.weight_decay

    def start(self) -> None:
        trainable(self.setting.model.network, True)
        trainable(self.setting.model.policy, False)
        self.optimisers = [sgd(self.setting.model.network, self.peak_rates[0], self._weight_decay)]


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
        return {"loss": loss.item(), "accuracy": accuracy(logits, labels)}


class Prime(Phase):
    """The policy's backbone learns to classify, through a linear layer that is then thrown away."""

    name = "prime"
    learns_network = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.prime
        self.epochs, self.batch, self.warmup_epochs = config.epochs, config.batch, config.warmup_epochs
        self.peak_rates = [config.learning_rate]

    def start(self) -> None:
        policy = self.setting.model.policy
        trainable(self.setting.model.network, False)
        trainable(policy, True)
        learning = nn.ModuleList([policy.backbone_and_head()[0], self.setting.classifier])
        self.optimisers = [sgd(learning, self.peak_rates[0], self.setting.config.prime.weight_decay)]

    def step(self, batch: Batch) -> dict[str, float]:
        with self.setting.autocast():
            logits = self.setting.classifier(self.setting.model.policy.features(batch.images))
        loss = self._classification_loss(logits, batch)
        self._learn(loss)
        return {"loss": loss.item(), "accuracy": accuracy(logits, batch.labels)}


class Adapt(NetworkPhase):
    """The network gets used to missing blocks: at random (stochastic depth), or the least important ones first."""

    name = "adapt"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, setting.config.adapt)
        self._levels = levels_from_text(setting.config.adapt.levels, setting.num_blocks)

    def begin(self, data: TrainingData, note: Callable[[str], None]) -> None:
        if not self._levels:
            return
        config = self.setting.config.adapt
        order = self._drop_order(data.train, config.order_images)
        self.setting.order = order
        note(f"blocks in the order of backward elimination on {config.order_images} training images: {order}")

    def rate_factor(self, epoch: float) -> float:
        floor = self.setting.config.adapt.final_rate
        return floor + (1 - floor) * super().rate_factor(epoch)

    def step(self, batch: Batch) -> dict[str, float]:
        setting, (images, labels, _) = self.setting, batch
        masks = self._nested_masks(images) if self._levels else self._random_masks(images)
        with setting.autocast():
            logits = setting.model.network.forward_masked(images, masks)
        loss = self._classification_loss(logits, batch)
        self._learn(loss)
        used = masks.float().sum(dim=1).mean().item()
        return {"loss": loss.item(), "accuracy": accuracy(logits, labels), "blocks_used": used}

    def _random_masks(self, images: Tensor) -> Tensor:
        """Every block on its own, at a keep rate that is drawn per image."""
        config, setting = self.setting.config.adapt, self.setting
        span = config.keep_high - config.keep_low
        rates = config.keep_low + span * setting.rand(len(images), 1)
        return setting.rand(len(images), setting.num_blocks) < rates

    def _nested_masks(self, images: Tensor) -> Tensor:
        """One of the levels per image; of two levels, the one with fewer blocks is contained in the other."""
        config, setting, device = self.setting.config.adapt, self.setting, images.device
        assert setting.order is not None
        levels = torch.tensor(self._levels, device=device)
        others = setting.randint(1, max(2, len(levels)), len(images))
        chosen = levels[others.clamp(max=len(levels) - 1)]
        chosen[: round(config.full_share * len(images))] = levels[0]
        return nested.most_probable(nested.importance(setting.order, device).expand(len(images), -1), chosen)


def levels_from_text(text: str, num_blocks: int) -> list[int]:
    """``"15,8,4"`` -> [15, 8, 4]; raises UsageError unless these are different numbers of blocks, most first."""
    if not text.strip():
        return []
    try:
        levels = [int(word) for word in text.split(",")]
    except ValueError:
        levels = []
    if not levels or sorted(set(levels), reverse=True) != levels or not 1 <= levels[-1] <= levels[0] <= num_blocks:
        raise UsageError(
            "adapt.levels",
            got=repr(text),
            expected=f"different numbers of blocks, most first, at most {num_blocks}, like {num_blocks},1",
        )
    return levels


class FinetuneFixed(Phase):
    """The network learns under masks that do not depend on the image (method ``fixed``)."""

    name = "finetune_fixed"
    settings = "finetune"
    decisive = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.finetune
        self.epochs, self.batch, self.warmup_epochs = config.epochs, config.batch, config.warmup_epochs
        self.peak_rates = [config.network_learning_rate]

    def begin(self, data: TrainingData, note: Callable[[str], None]) -> None:
        config, setting = self.setting.config.fixed, self.setting
        if config.mask != "search":
            setting.fixed_mask = config.mask
            return
        assert config.kept is not None  # checked before the run starts
        order = self._drop_order(data.validation, config.search_images)
        mask = [index in order[len(order) - config.kept :] for index in range(setting.num_blocks)]
        setting.fixed_mask = mask_to_text(mask)
        note(
            f"searched mask, by backward elimination on {config.search_images} validation images: {setting.fixed_mask}"
        )

    def start(self) -> None:
        config, model = self.setting.config.finetune, self.setting.model
        trainable(model.network, True)
        trainable(model.policy, False)
        self.optimisers = [make_optimiser(config.optimiser, model.network, self.peak_rates[0], config.weight_decay)]

    def rate_factor(self, epoch: float) -> float:
        return finetuning_rate(self, super().rate_factor(epoch), epoch)

    def strategy(self) -> Strategy:
        return self.setting.fixed_strategy()[1]

    def step(self, batch: Batch) -> dict[str, float]:
        images, labels, _ = batch
        masks = self._masks(images)
        with self.setting.autocast():
            logits = self.setting.model.network.forward_masked(images, masks)
        loss = self._classification_loss(logits, batch)
        self._learn(loss)
        return {"loss": loss.item(), "accuracy": accuracy(logits, labels)}

    def _masks(self, images: Tensor) -> Tensor:
        """The fixed masks of one batch; RandomK draws from the run's own random source, so that resuming agrees."""
        setting = self.setting
        if setting.fixed_mask != "random-k":
            return self.strategy()(images)
        draws = setting.rand(len(images), setting.num_blocks)
        kept = torch.full((len(images),), setting.config.fixed.kept or 0, device=images.device)
        return nested.most_probable(draws, kept)


REOPENED_ENTROPY, REOPENED_BOUND = 0.05, 0.8  # of a policy that gave every image the same mask


class PolicyPhase(Phase):
    """What curriculum and finetuning share: sampling masks and the policy gradient."""

    uses_policy = True
    explores = True  # exploration can be raised

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.exploration_bound = setting.config.policy.exploration_bound
        self.entropy_weight = setting.config.policy.entropy_bonus
        self.now_open = setting.num_blocks
        self.reopened = False

    def at(self, epoch: float) -> None:
        super().at(epoch)
        self.now_open = self.opened(int(epoch))
        bonus = max(self.setting.config.policy.entropy_bonus, REOPENED_ENTROPY if self.reopened else 0.0)
        self.entropy_weight = bonus * max(0.0, 1 - epoch / max(1, self.epochs))

    def reopen(self) -> None:
        """Make the policy explore again: what the loop does about one mask for all images."""
        self.reopened = True

    @property
    def _learns_head(self) -> bool:
        return self.setting.config.policy.learns == "head"

    def decider(self) -> nn.Module:
        """What learns to decide, beside the network."""
        return self.setting.model.policy

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
        return self._regularised(-(advantages * log_probability).mean(), probabilities)

    def _regularised(self, loss: Tensor, probabilities: Tensor) -> Tensor:
        """A policy loss minus the entropy bonus, plus the budget; the same for every estimator."""
        loss = loss - self.entropy_weight * rollout.entropy(probabilities, self.now_open)
        config = self.setting.config.policy
        # While the curriculum holds blocks, the open ones alone cannot meet the budget and would all be dropped.
        if config.target_blocks is None or self.now_open < self.setting.num_blocks:
            return loss
        return loss + config.budget_weight * budget_loss(probabilities, config.target_blocks, self.setting.world)

    def _nested(self, images: Tensor, labels: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (N, J) at the cuts and the policy loss of the nested estimator (:mod:`bdexport.train.nested`)."""
        config, setting = self.setting.config.policy, self.setting
        closed = setting.num_blocks - self.now_open
        cuts = nested.cut_points(setting.num_blocks, closed, config.cuts, setting.generator)
        held = torch.cat([torch.ones_like(probabilities[:, :closed]), probabilities[:, closed:]], dim=1)
        rewards = []
        for kept in cuts:
            masks = nested.most_probable(held.detach(), torch.full_like(labels, kept))
            rewards.append(self._rewards(self._evaluated(images, masks), labels, masks))
        stacked = torch.stack(rewards, dim=1)
        loss = -nested.expected_reward(held, stacked, cuts).mean()
        # The bonus is a sum over the open blocks, as the reward is; rollout.entropy is their mean.
        loss = loss - config.softness * self.now_open * rollout.entropy(probabilities, self.now_open)
        return stacked, self._regularised(loss, probabilities)

    def _gates(self, probabilities: Tensor) -> Tensor:
        """Gates (S, N, K) of the Gumbel-sigmoid estimator (:mod:`bdexport.train.gumbel`)."""
        config, setting = self.setting.config.policy, self.setting
        sampled_from = rollout.bounded(probabilities, self.exploration_bound)
        return gumbel.sample_gates(
            sampled_from, self.now_open, config.samples, config.temperature, setting.generator, setting.world
        )

    def _gated(self, images: Tensor, labels: Tensor, probabilities: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (S, N) and the policy loss of the Gumbel-sigmoid estimator; the network learns nothing from it."""
        config, network = self.setting.config.policy, self.setting.model.network
        rewards = []
        with _frozen(network):
            for one in gates:
                with self.setting.autocast():
                    logits = network.forward_gated(images, one)
                rewards.append(reward(logits.float(), labels, one, config.wrong_prediction_penalty, config.reward))
        stacked = torch.stack(rewards)
        return stacked.detach(), self._regularised(-stacked.mean(), probabilities)

    def _sampled(self, probabilities: Tensor) -> Tensor:
        config, setting = self.setting.config.policy, self.setting
        sampled_from = rollout.bounded(probabilities, self.exploration_bound)
        return rollout.sample_masks(sampled_from, self.now_open, config.samples, setting.generator, setting.world)

    def _advantages(self, rewards: Tensor, probabilities: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Advantages (S, N) of sampled rewards (S, N)."""
        if self.setting.config.policy.estimator == "leave_one_out":
            return leave_one_out_advantage(rewards)
        greedy = rollout.greedy_masks(probabilities, self.now_open)
        return rewards - self._rewards(self._evaluated(images, greedy), labels, greedy)


class Curriculum(PolicyPhase):
    """Algorithm 1, lines 3-13: the policy learns on the frozen network, opening blocks from the last one."""

    name = "curriculum"
    learns_network = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.curriculum
        self.epochs, self.batch, self.share = config.epochs, config.batch, config.epoch_share

    def begin(self, data: TrainingData, note: Callable[[str], None]) -> None:
        config = self.setting.config.policy
        if config.order_images == 0:
            return
        order = self.setting.order or self._drop_order(data.train, config.order_images)
        note(f"blocks in the order of backward elimination on {config.order_images} training images: {order}")
        start_in_order(self.setting.model.policy, order, config.initial_keep_logit, config.order_spread)

    def start(self) -> None:
        config = self.setting.config.curriculum
        policy, deciding = self.setting.model.policy, self.decider()
        trainable(self.setting.model.network, False)
        trainable(policy, False)
        trainable(deciding, True)
        if self._learns_head:
            backbone, deciding = policy.backbone_and_head()
            trainable(backbone, False)
        self.optimisers = [Adam(deciding.parameters(), config.learning_rate)]
        self.peak_rates = [config.learning_rate]

    def opened(self, epoch: int) -> int:
        return rollout.open_blocks(epoch, self.setting.num_blocks, self.setting.config.curriculum.blocks_per_epoch)

    def rate_factor(self, epoch: float) -> float:
        """Constant, as in the paper."""
        return 1.0

    def step(self, batch: Batch) -> dict[str, float]:
        images, labels, _ = batch
        probabilities = self._probabilities(images)
        estimator = self.setting.config.policy.estimator
        if estimator == "nested":
            rewards, loss = self._nested(images, labels, probabilities)
        elif estimator == "gumbel":
            rewards, loss = self._gated(images, labels, probabilities, self._gates(probabilities))
        else:
            masks = self._sampled(probabilities)
            rewards = torch.stack([self._rewards(self._evaluated(images, one), labels, one) for one in masks])
            loss = self._policy_loss(probabilities, masks, self._advantages(rewards, probabilities, images, labels))
        self._learn(loss)
        used = rollout.greedy_masks(probabilities, self.now_open).float().sum(dim=1).mean().item()
        return {"loss": loss.item(), "reward": rewards.mean().item(), "blocks_used": used}


class Finetune(PolicyPhase):
    """Algorithm 1, lines 14-16: network and policy learn together."""

    name = "finetune"
    decisive = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.finetune
        self.epochs, self.batch, self.warmup_epochs = config.epochs, config.batch, config.warmup_epochs

    def start(self) -> None:
        config, model = self.setting.config.finetune, self.setting.model
        trainable(model.network, True)
        trainable(model.policy, False)
        trainable(self.decider(), True)
        rates = (config.network_learning_rate, config.policy_learning_rate)
        classifying: nn.Module = model.network
        deciding = self.decider()
        if self._learns_head:
            backbone, deciding = model.policy.backbone_and_head()
            classifying = nn.ModuleList([model.network, backbone, self.setting.classifier])
        self.optimisers = [
            make_optimiser(config.optimiser, classifying, rates[0], config.weight_decay),
            Adam(deciding.parameters(), rates[1]),
        ]
        self.peak_rates = list(rates)

    def at(self, epoch: float) -> None:
        super().at(epoch)
        config = self.setting.config.policy
        progress = min(1.0, epoch / max(1, self.epochs))
        span = config.finetune_bound_end - config.finetune_bound_start
        self.exploration_bound = config.finetune_bound_start + span * progress
        if self.reopened:
            self.exploration_bound = min(self.exploration_bound, REOPENED_BOUND)

    def rate_factor(self, epoch: float) -> float:
        return finetuning_rate(self, super().rate_factor(epoch), epoch)

    def step(self, batch: Batch) -> dict[str, float]:
        setting, config = self.setting, self.setting.config.finetune
        images, labels, _ = batch
        probabilities, backbone_loss = self._decided(batch)
        estimator = setting.config.policy.estimator
        gates = self._gates(probabilities) if estimator == "gumbel" else None
        if gates is not None:
            masks = gates.detach().bool()
        elif estimator == "nested":
            masks = rollout.greedy_masks(probabilities, self.now_open)[None]
        else:
            masks = self._sampled(probabilities)
        # The batch: images that run every block, images that run a random number of their most probable blocks, images
        # that the policy learns from, and the rest, on which only the network learns. Images that ran every block say
        # nothing about the masks that were drawn for them.
        whole, levels = int(config.full_share * len(images)), int(config.level_share * len(images))
        learned = len(images) - whole - levels
        judged = slice(len(images) - max(1, int(config.policy_share * learned)), len(images))
        run = masks[0].clone()
        run[:whole] = True
        run[whole : whole + levels] = self._random_levels(probabilities[whole : whole + levels])
        with setting.autocast():
            logits = setting.model.network.forward_masked(images, run)
        loss = self._classification_loss(logits, batch)
        if gates is not None:
            rewards, policy_loss = self._gated(images[judged], labels[judged], probabilities[judged], gates[:, judged])
        elif estimator == "nested":
            rewards, policy_loss = self._nested(images[judged], labels[judged], probabilities[judged])
        else:
            rewards, policy_loss = self._judge(
                logits[judged], images[judged], labels[judged], probabilities[judged], masks[:, judged]
            )
        self._learn(loss + policy_loss + backbone_loss)
        used = rollout.greedy_masks(probabilities, self.now_open).float().sum(dim=1).mean().item()
        return {
            "loss": loss.item(),
            "reward": rewards.mean().item(),
            "accuracy": accuracy(logits, labels),
            "blocks_used": used,
        }

    def _decided(self, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """Keep-probabilities (N, K), and what the backbone learns from where the policy gradient does not reach it."""
        if not self._learns_head:
            return self._probabilities(batch.images), 0.0
        policy = self.setting.model.policy
        with self.setting.autocast():
            features = policy.features(batch.images)
            logits, classes = policy.decide(features.detach()), self.setting.classifier(features)
        return logits.float().sigmoid(), self._classification_loss(classes, batch)

    def _judge(
        self, logits: Tensor, images: Tensor, labels: Tensor, probabilities: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rewards (S, N) and the policy loss; ``logits`` (N, C) belong to the first of the masks (S, N, K)."""
        others = [self._rewards(self._evaluated(images, one), labels, one) for one in masks[1:]]
        rewards = torch.stack([self._rewards(logits, labels, masks[0]), *others])
        advantages = self._advantages(rewards, probabilities, images, labels)
        return rewards, self._policy_loss(probabilities, masks, advantages)

    def _random_levels(self, probabilities: Tensor) -> Tensor:
        """Masks (N, K) of each image's most probable blocks, their number uniform in 1..K."""
        kept = self.setting.randint(1, self.setting.num_blocks + 1, len(probabilities))
        return nested.most_probable(probabilities.detach(), kept)


@torch.no_grad()
def start_in_order(policy: PolicyNet, order: list[int], center: float, spread: float) -> None:
    """Set the policy's last layer so that every image drops blocks in ``order``.

    Biases run from ``center - spread`` for the first block to drop to ``center + spread`` for the last; the weights are
    zero, so that images differ only in what is learned from here.
    """
    policy.fc.weight.zero_()
    steps = torch.linspace(center - spread, center + spread, len(order), device=policy.fc.bias.device)
    policy.fc.bias[torch.tensor(order, device=steps.device)] = steps


def finetuning_rate(phase: Phase, cosine: float, epoch: float) -> float:
    """The factor of the configured schedule; ``step``: x0.1 for the last fifth."""
    if phase.setting.config.finetune.schedule == "step":
        return 1.0 if epoch < 0.8 * phase.epochs else 0.1
    return cosine


def trainable(module: nn.Module, trainable: bool) -> None:
    """Train mode with gradients, or eval mode (fixed batch-norm statistics) without."""
    module.train(trainable)
    module.requires_grad_(trainable)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for the parameters, as it was before afterwards; gradients still pass through."""
    training, learning = module.training, [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)


def _decayed(module: nn.Module) -> Iterable[dict[str, object]]:
    """Weight decay on convolutions and linear weights only: batch norm and biases are not shrunk."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def sgd(module: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    return SGD(_decayed(module), learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def make_optimiser(kind: Optimiser, module: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    if kind == "sgd":
        return sgd(module, learning_rate, weight_decay)
    return Adam(_decayed(module), learning_rate, weight_decay=weight_decay)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * (logits.argmax(dim=1) == labels).float().mean().item()
