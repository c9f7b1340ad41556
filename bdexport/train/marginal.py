"""The marginal estimator: the policy's logits are what the next blocks are worth to an image, minus their price.

Where the paper samples masks and compares rewards (Wu et al. 2018, Eqn. 6), this runs each judged image at a few nested
levels (the same blocks for all images, in their order of importance) and learns three things from the outcomes:

* a critic q_l(x), from the policy's features to the probability that level l classifies x rightly (cross-entropy with
  the probability of the true class; it takes the noise out of single outcomes, and is thrown away at the end);
* the policy's logits z_k(x) = 100 (q_l(x) - q_(l-1)(x)) / (n_l - n_(l-1)) - price, by least squares, for the blocks k
  that level l (n_l blocks) has and level l - 1 has not: points of accuracy per block, minus what a block costs;
* the price, which moves all logits alike so that greedy masks (z >= 0) keep ``target_blocks`` on average.

A logit that follows a value does not saturate, as policy-gradient logits do: what is nearly sure for the mean image
stays open for an unusual one. The reward is success minus a price per block, not Eqn. 3, whose squared usage outweighs
every gain in accuracy that an image can be predicted to have (gamma = 5: from 7 to 15 of 15 blocks it takes what 13
points of accuracy earn), so that its best policy is nearly the same mask for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from bdexport.errors import DivergedError
from bdexport.retarget import shift_for
from bdexport.train import nested
from bdexport.train.data import Batch, TrainingData
from bdexport.train.phases import FinetuningPhase, PolicyPhase, Setting, levels_from_text, sgd, trainable

LOGIT_LIMIT = 3.0  # the first level's blocks are worth far more than they cost; nothing is gained by learning how much
LESSON = 256  # remembered images in one step of critic and head
PRICE_RATE = 0.05  # share of a batch's error in block usage that its step mends


def worth(success: Tensor, levels: list[int], order: list[int], chance: float) -> Tensor:
    """Points of accuracy that each block adds, (N, K), for probabilities of success (N, L) at ascending ``levels``.

    ``order``: blocks from the least to the most important. Before the first level stands guessing (``chance``).
    """
    before = torch.cat([torch.full_like(success[:, :1], chance), success[:, :-1]], dim=1)
    sizes, level_of = _steps(tuple(levels), tuple(order), success.device)
    per_block = 100 * (success - before) / sizes
    beyond = torch.full_like(per_block[:, :1], -LOGIT_LIMIT)  # blocks beyond the last level
    return torch.cat([per_block, beyond], dim=1)[:, level_of]


@lru_cache(maxsize=16)  # the same in every step: to make it anew costs two copies to the GPU, which it waits for
def _steps(levels: tuple[int, ...], order: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks each level adds, (L,), and which level brings in each block, (K,), L where none does."""
    sizes = [n - m for m, n in zip((0, *levels), levels, strict=False)]
    level_of = [0] * len(order)
    for place, block in enumerate(reversed(order)):
        level_of[block] = next((i for i, n in enumerate(levels) if place < n), len(levels))
    return torch.tensor(sizes, device=device), torch.tensor(level_of, device=device)


@torch.no_grad()
def tie_levels(last: nn.Linear, levels: list[int], order: list[int]) -> None:
    """Give the blocks that come in with the same level the same row of the policy's last layer.

    They have the same targets, so that equal rows stay equal, and masks are levels: the network has learned no others.
    """
    first_of: dict[int, int] = {}
    for place, block in enumerate(reversed(order)):
        level = next((n for n in levels if place < n), levels[-1] + 1)
        leader = first_of.setdefault(level, block)
        last.weight[block], last.bias[block] = last.weight[leader].clone(), last.bias[leader].clone()


class MarginalPhase(PolicyPhase):
    """What learning on the frozen network and finetuning share."""

    explores = False  # levels are run for their own sake, whatever the policy would do

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._levels = levels_from_text(setting.config.adapt.levels, setting.num_blocks)[::-1]
        self._head_optimiser: Optimizer

    def begin(self, data: TrainingData, note: Callable[[str], None]) -> None:
        setting, count = self.setting, self.setting.config.adapt.order_images
        if setting.order is None:
            setting.order = self._drop_order(data.train, count)
            note(f"blocks in the order of backward elimination on {count} training images: {setting.order}")
        tie_levels(setting.model.policy.fc, self._levels, setting.order)

    def _level_masks(self, kept: Tensor) -> Tensor:
        """Masks (N, K) of the ``kept`` (N,) most important blocks."""
        setting = self.setting
        assert setting.order is not None
        return nested.most_probable(nested.importance(setting.order, kept.device).expand(len(kept), -1), kept)

    def _outcomes(self, batch: Batch, rows: slice) -> Tensor:
        """The true class's probability at every level, (N, L), for the images ``rows``."""
        images, labels = batch.images[rows], batch.labels[rows]
        outcomes = []
        for level in self._levels:
            run = self._evaluated(images, self._level_masks(torch.full_like(labels, level)))
            outcomes.append(run.float().softmax(dim=1).gather(1, labels[:, None]))
        return torch.cat(outcomes, dim=1)

    def _remember(self, features: Tensor, success: Tensor) -> None:
        """Keep what was seen: an outcome costs a run at every level, a lesson from it next to nothing.

        Every process remembers the whole batch: one that resumes the run finds what another one has saved.
        """
        setting = self.setting
        seen = setting.world.whole(torch.cat([features.detach().float(), success], dim=1))
        new = seen.split_with_sizes([features.shape[1], success.shape[1]], dim=1)
        old = setting.memory or (new[0][:0], new[1][:0])
        known, outcomes = (torch.cat(pair)[-setting.config.policy.memory :] for pair in zip(old, new, strict=True))
        setting.memory = known, outcomes

    def _learn_head(self) -> float:
        """So many steps of critic and head on random remembered images; returns the critic's mean cross-entropy."""
        setting, optimiser = self.setting, self._head_optimiser
        assert setting.order is not None
        assert setting.memory is not None
        features, success = setting.memory
        chance = 1 / setting.model.network.spec.num_classes
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        for _ in range(setting.config.policy.lessons):
            drawn = torch.randint(0, len(features), (LESSON,), generator=setting.generator, device=features.device)
            rows = setting.world.mine(drawn)
            judged = setting.critic(features[rows])
            critic_loss = F.binary_cross_entropy_with_logits(judged, success[rows])
            value = worth(judged.detach().sigmoid(), self._levels, setting.order, chance)
            target = (value - setting.price).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
            loss = critic_loss + F.mse_loss(setting.model.policy.decide(features[rows]), target)
            optimiser.zero_grad(set_to_none=True)
            evenly = len(rows) * setting.world.size / LESSON  # a share may be one row shorter than another
            (evenly * loss).backward()  # type: ignore[no-untyped-call]
            setting.world.average_gradients(p for group in optimiser.param_groups for p in group["params"])
            optimiser.step()
            total += critic_loss.detach()
        mean = setting.world.mean((total / setting.config.policy.lessons).float())  # all processes must judge alike
        if not torch.isfinite(mean):
            # Outcomes of a network that is lost are no numbers; the critic itself is the policy's.
            seen = torch.isfinite(features).all() and torch.isfinite(success).all()
            remedy = self.calmer("policy" if seen else "network")
            raise DivergedError(f"{self.name}: the critic's loss is {mean.item()}", remedy=remedy)
        return mean.item()

    @torch.no_grad()
    def _settle_price(self, logits: Tensor) -> None:
        """Move price and bias so that usage comes nearer to the target; ``logits`` (N, K) are this shard's."""
        target = self.setting.config.policy.target_blocks
        assert target is not None  # checked before the run starts
        shift = torch.tensor(shift_for(self.setting.world.whole(logits.float()).cpu().numpy(), target))
        step = PRICE_RATE * shift.clamp(-2.0, 2.0).item()
        self.setting.model.policy.fc.bias.add_(step)
        self.setting.price -= step


class LearnMargins(MarginalPhase):
    """Head and critic learn on the frozen network and the policy's frozen backbone: the curriculum's place."""

    name = "curriculum"
    learns_network = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.curriculum
        self.epochs, self.batch, self.share = config.epochs, config.batch, config.epoch_share

    def start(self) -> None:
        config, policy = self.setting.config.curriculum, self.setting.model.policy
        trainable(self.setting.model.network, False)
        trainable(policy, False)
        _, head = policy.backbone_and_head()
        trainable(head, True)
        rate = config.learning_rate
        self._head_optimiser = Adam([*head.parameters(), *self.setting.critic.parameters()], rate)
        self.optimisers = [Adam(self.setting.classifier.parameters(), rate), self._head_optimiser]
        self.peak_rates = [rate, rate]

    def step(self, batch: Batch) -> dict[str, float]:
        policy = self.setting.model.policy
        with torch.no_grad(), self.setting.autocast():
            features = policy.features(batch.images).float()
        # The classifier may be new (it is not part of a checkpoint), and finetuning begins with it.
        loss = self._classification_loss(self.setting.classifier(features), batch)
        self._learn(loss)
        success = self._outcomes(batch, slice(None))
        self._remember(features, success)
        critic_loss = self._learn_head()
        with torch.no_grad():
            logits = policy.decide(features)
        self._settle_price(logits)
        used = (logits >= 0).float().sum(dim=1).mean().item()
        return {"loss": critic_loss, "success": success.mean().item(), "blocks_used": used}


class FinetuneMargins(FinetuningPhase, MarginalPhase):
    """The network learns the masks that the policy gives, and the policy what blocks are worth on that network."""

    def start(self) -> None:
        config, model = self.setting.config.finetune, self.setting.model
        trainable(model.network, True)
        trainable(model.policy, True)
        backbone, head = model.policy.backbone_and_head()
        classifying = nn.ModuleList([model.network, backbone, self.setting.classifier])
        rate = config.policy_learning_rate
        self._head_optimiser = Adam([*head.parameters(), *self.setting.critic.parameters()], rate)
        network = sgd(classifying, config.network_learning_rate, config.weight_decay)
        self.optimisers = [network, self._head_optimiser]
        self.peak_rates = [config.network_learning_rate, config.policy_learning_rate]

    def step(self, batch: Batch) -> dict[str, float]:
        setting, config = self.setting, self.setting.config.finetune
        policy, count = setting.model.policy, len(batch.images)
        with setting.autocast():
            features = policy.features(batch.images)
            classes = setting.classifier(features)
        with torch.no_grad():
            logits = policy.decide(features.float())
        # The batch: images that run every block, images at a random level, and the rest at the policy's masks; the
        # policy learns from the end of the batch.
        whole, levels = int(config.full_share * count), int(config.level_share * count)
        masks = logits >= 0
        masks[:whole] = True
        drawn = torch.tensor(self._levels, device=logits.device)[setting.randint(0, len(self._levels), levels)]
        masks[whole : whole + levels] = self._level_masks(drawn)
        with setting.autocast():
            run = setting.model.network.forward_masked(batch.images, masks)
        loss = self._classification_loss(run, batch)
        judged = slice(count - max(1, int(config.policy_share * count)), count)
        self._learn(loss + self._classification_loss(classes, batch))
        success = self._outcomes(batch, judged)
        self._remember(features[judged], success)
        self._learn_head()
        self._settle_price(logits)
        return {
            "loss": loss.item(),
            "success": success.mean().item(),
            "accuracy": 100.0 * (run.argmax(dim=1) == batch.labels).float().mean().item(),
            "blocks_used": (logits >= 0).float().sum(dim=1).mean().item(),
        }
