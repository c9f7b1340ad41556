"""Phases in which the network learns by itself: what pretrain and adapt share."""

from __future__ import annotations

from bdexport.config import AdaptConfig, PretrainConfig
from bdexport.train.phases.base import Phase, trainable
from bdexport.train.phases.optimisers import sgd
from bdexport.train.phases.setting import Setting


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
