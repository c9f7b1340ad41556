"""The shape that all phases share, so that the loop (:mod:`bdexport.train.loop`) treats them alike.

``start`` prepares modules and optimisers, ``at`` sets what depends on progress, ``step`` learns from one batch and
returns figures to average.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from bdexport.errors import DivergedError
from bdexport.evaluate import Strategy, keep_all
from bdexport.mask_search import drop_order
from bdexport.train import advice
from bdexport.train.data import Batch, DeviceImages, TrainingData
from bdexport.train.phases.setting import Setting


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

    def _learn(self, loss: Tensor, policy_loss: Tensor | None = None) -> None:
        """One step of every optimiser. ``policy_loss``: what only the policy, or the gates, learns from, if any."""
        world = self.setting.world
        parts = [("network" if self.learns_network else "policy", "loss", loss)]
        if policy_loss is not None:
            parts.append(("policy", "policy's loss", policy_loss))
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        (loss if policy_loss is None else loss + policy_loss).backward()  # type: ignore[no-untyped-call]
        # Looked at only now, so that a GPU has the backward pass to do meanwhile; no weight has changed yet.
        for part, name, one in parts:  # the network's first: a network that is lost spoils the policy's rewards
            mean = world.mean(one.detach())  # of the whole batch: all processes must judge alike
            if not torch.isfinite(mean):
                raise DivergedError(f"{self.name}: the {name} is {mean.item()}", remedy=self.calmer(part))
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        world.average_gradients(parameter for group in groups for parameter in group["params"])
        for optimiser in self.optimisers:
            optimiser.step()

    def calmer(self, part: str = "network") -> str:
        """What to change when ``part`` (network, policy or gates) has diverged."""
        config, group = self.setting.config, self.settings or self.name
        if part == "network" and not self.learns_network:
            group = advice.last_learned(config, group)
        return advice.calmer(config, group, part, self.setting.bf16)

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


class FinetuningPhase(Phase):
    """What all methods' last phase shares: the settings ``finetune``, and that the run's model is chosen there."""

    name = settings = "finetune"
    decisive = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.finetune
        self.epochs, self.batch, self.warmup_epochs = config.epochs, config.batch, config.warmup_epochs

    def rate_factor(self, epoch: float) -> float:
        """The configured schedule; ``step``: x0.1 for the last fifth."""
        if self.setting.config.finetune.schedule == "step":
            return 1.0 if epoch < 0.8 * self.epochs else 0.1
        return super().rate_factor(epoch)


def trainable(module: nn.Module, trainable: bool) -> None:
    """Train mode with gradients, or eval mode (fixed batch-norm statistics) without."""
    module.train(trainable)
    module.requires_grad_(trainable)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * (logits.argmax(dim=1) == labels).float().mean().item()
