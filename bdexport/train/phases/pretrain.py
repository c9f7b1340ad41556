"""Phase ``pretrain``: the base network."""

from __future__ import annotations

from torch.nn import functional as F

from bdexport.train.data import Batch
from bdexport.train.phases.base import accuracy
from bdexport.train.phases.network import NetworkPhase
from bdexport.train.phases.setting import Setting


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
