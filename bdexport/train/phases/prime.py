"""Phase ``prime``: the policy's backbone."""

from __future__ import annotations

from torch import nn

from bdexport.train.data import Batch
from bdexport.train.phases.base import Phase, accuracy, trainable
from bdexport.train.phases.optimisers import sgd
from bdexport.train.phases.setting import Setting


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
