"""The phases of a run: pretrain, prime, adapt, curriculum, finetune. Each knows its parameters, schedule and one step.

Inside this package modules import one another by name: setting <- base <- network, policy <- a module for each phase.
"""

from bdexport.train.phases.adapt import Adapt
from bdexport.train.phases.base import FinetuningPhase, Phase, accuracy, trainable
from bdexport.train.phases.curriculum import Curriculum, start_in_order
from bdexport.train.phases.finetune import Finetune
from bdexport.train.phases.fixed import FinetuneFixed
from bdexport.train.phases.optimisers import make_optimiser, sgd
from bdexport.train.phases.policy import PolicyPhase
from bdexport.train.phases.pretrain import Pretrain
from bdexport.train.phases.prime import Prime
from bdexport.train.phases.setting import Setting, levels_from_text

__all__ = [
    "Adapt",
    "Curriculum",
    "Finetune",
    "FinetuneFixed",
    "FinetuningPhase",
    "Phase",
    "PolicyPhase",
    "Pretrain",
    "Prime",
    "Setting",
    "accuracy",
    "levels_from_text",
    "make_optimiser",
    "sgd",
    "start_in_order",
    "trainable",
]
