"""Phase ``adapt``: a network that can do without blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bdexport.train import nested
from bdexport.train.data import Batch, TrainingData
from bdexport.train.phases.base import accuracy
from bdexport.train.phases.network import NetworkPhase
from bdexport.train.phases.setting import Setting, levels_from_text


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
