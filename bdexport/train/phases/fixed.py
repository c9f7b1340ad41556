"""Phase ``finetune_fixed``: the network under a mask that no image influences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bdexport.evaluate import Strategy
from bdexport.parts import mask_to_text
from bdexport.train import nested
from bdexport.train.data import Batch, TrainingData
from bdexport.train.phases.base import FinetuningPhase, accuracy, trainable
from bdexport.train.phases.optimisers import make_optimiser
from bdexport.train.phases.setting import Setting


class FinetuneFixed(FinetuningPhase):
    """The network learns under masks that do not depend on the image (method ``fixed``)."""

    name = "finetune_fixed"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.peak_rates = [setting.config.finetune.network_learning_rate]

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
