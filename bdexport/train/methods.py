"""The methods of ``bdexport train --method`` and the phases that each goes through."""

from __future__ import annotations

from bdexport.train.halting import FinetuneHalting
from bdexport.train.phases import Adapt, Curriculum, Finetune, FinetuneFixed, Phase, Pretrain, Prime
from bdexport.train.sequential import SequentialCurriculum, SequentialFinetune

METHODS: dict[str, tuple[type[Phase], ...]] = {
    "blockdrop": (Pretrain, Prime, Adapt, Curriculum, Finetune),
    "fixed": (Pretrain, Adapt, FinetuneFixed),
    "sequential": (Pretrain, Adapt, SequentialCurriculum, SequentialFinetune),
    "act": (Pretrain, FinetuneHalting),
    "sact": (Pretrain, FinetuneHalting),
}
