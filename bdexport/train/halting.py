"""The phase of ACT and SACT: network and halting units learn together, with a price on every block.

    loss = classification loss + tau x ponder cost          (Figurnov et al., CVPR 2017, section 3.1)

as many epochs and steps as ``finetune`` has, with the network's optimiser and rates from there for both (the authors
use one optimiser). Nothing steers to a number of blocks: tau does, and the model of the last epoch is taken, since one
chosen by accuracy alone would be an early one that has not learned to stop yet.
"""

from __future__ import annotations

from torch import nn

from bdexport.evaluate import Strategy
from bdexport.models.halting import HaltingGates
from bdexport.train.data import Batch
from bdexport.train.phases import FinetuningPhase, Setting, accuracy, make_optimiser, trainable


class FinetuneHalting(FinetuningPhase):
    """Methods ``act`` and ``sact``."""

    name = "finetune_halting"
    takes_last = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.peak_rates = [setting.config.finetune.network_learning_rate]

    def strategy(self) -> Strategy | None:
        """The units decide."""
        return None

    def start(self) -> None:
        config, model = self.setting.config.finetune, self.setting.model
        learning = nn.ModuleList([model.network, self._gates()])
        trainable(model.policy, False)
        trainable(learning, True)
        self.optimisers = [make_optimiser(config.optimiser, learning, self.peak_rates[0], config.weight_decay)]

    def step(self, batch: Batch) -> dict[str, float]:
        setting = self.setting
        with setting.autocast():
            decided = self._gates().run(setting.model.network, batch.images)
        assert decided.ponder is not None
        ponder = decided.ponder.mean()
        loss = self._classification_loss(decided.logits, batch)
        self._learn(loss + setting.config.halting.ponder_weight * ponder)
        return {
            "loss": loss.item(),
            "ponder": ponder.item(),
            "accuracy": accuracy(decided.logits, batch.labels),
            "blocks_used": decided.positions.sum(dim=1).mean().item(),
        }

    def _gates(self) -> HaltingGates:
        gates = self.setting.model.gates
        assert isinstance(gates, HaltingGates)
        return gates
