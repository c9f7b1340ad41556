"""Which phases a run has: by its method and, for blockdrop, by how its policy learns."""

from __future__ import annotations

from bdexport.config import TrainConfig
from bdexport.train.halting import FinetuneHalting
from bdexport.train.marginal import FinetuneMargins, LearnMargins
from bdexport.train.phases import Adapt, Curriculum, Finetune, FinetuneFixed, Phase, Pretrain, Prime
from bdexport.train.sequential import SequentialCurriculum, SequentialFinetune

METHODS: dict[str, tuple[type[Phase], ...]] = {
    "blockdrop": (Pretrain, Prime, Adapt, Curriculum, Finetune),
    "fixed": (Pretrain, Adapt, FinetuneFixed),
    "sequential": (Pretrain, Adapt, SequentialCurriculum, SequentialFinetune),
    "act": (Pretrain, FinetuneHalting),
    "sact": (Pretrain, FinetuneHalting),
}
MARGINAL: tuple[type[Phase], ...] = (Pretrain, Prime, Adapt, LearnMargins, FinetuneMargins)


def phases_of(config: TrainConfig) -> tuple[type[Phase], ...]:
    """The phases in order."""
    marginal = config.method == "blockdrop" and config.policy.estimator == "marginal"
    return MARGINAL if marginal else METHODS[config.method]
