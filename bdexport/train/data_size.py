"""Presets are made for data sets of CIFAR's size; on smaller ones batch, learning rates and epochs follow the size.

At batch 256, 340 images are one step an epoch, at a learning rate that was chosen for 176. So a smaller data set gets

* the largest batch (a power of two, at most the preset's) that makes at least 20 steps an epoch;
* learning rates in proportion to the batch for SGD (Goyal et al., 2017), to its square root for Adam;
* more epochs: as the square root of what the data set is smaller by, at most three times as many;
* a curriculum that sees the whole of it in an epoch, and epochs that leave no image out.

What the user sets stays as it is. The preset ``paper`` is the paper's schedule and is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch

from bdexport.config import TrainConfig
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.train.request import TrainRequest, wanted_policy

AS_THEY_ARE = 22_500  # training images from which on presets are taken as they are; CIFAR has 45,000
FEWEST_STEPS = 20  # an epoch
SMALLEST_BATCH = 8  # batch norm estimates little from fewer
SMOKE_FLOPS = 4.5e12  # 45 seconds at 100 GFLOP/s, between the two machines in docs/training.md, Speed
SMOKE_FEWEST = 32
MOST_EPOCHS = 3.0  # times the preset's
PHASES = ("pretrain", "prime", "adapt", "curriculum", "finetune")
ADAM = ("policy_learning_rate",)  # in finetune, whatever its optimiser is; the curriculum has Adam alone
FOLLOWING = ("batch", "epochs", "epoch_share", "learning_rate", "network_learning_rate", "policy_learning_rate")


def follows(preset: str, images: int) -> bool:
    """Whether settings of this preset follow a data set of so many training images."""
    return preset != "paper" and images < AS_THEY_ARE


def following_settings() -> Iterable[str]:
    """The dotted names of all settings that follow the data's size."""
    yield "whole_epochs"
    for phase in PHASES:
        yield from (f"{phase}.{name}" for name in FOLLOWING if hasattr(getattr(TrainConfig(), phase), name))


def fitted_to_data(config: TrainConfig, preset: TrainConfig, images: int, given: Collection[str]) -> TrainConfig:
    """``config``, made from ``preset``, for so many training images; ``given``: dotted names that the user has set."""
    if not follows(preset.preset, images):
        return config
    changes: dict[str, Any] = {} if "whole_epochs" in given else {"whole_epochs": True}
    for phase in PHASES:
        own = {name.partition(".")[2] for name in given if name.startswith(f"{phase}.")}
        changes[phase] = _phase(getattr(config, phase), getattr(preset, phase).batch, config, images, own)
    return replace(config, **changes)


def _phase(settings: Any, usual_batch: int, config: TrainConfig, images: int, given: Collection[str]) -> Any:
    """The settings of one phase; ``given``: names in it that the user has set."""
    changes: dict[str, Any] = {}
    share = getattr(settings, "epoch_share", 1.0)
    if share < 1.0 and "epoch_share" not in given:
        share = changes["epoch_share"] = min(1.0, share * AS_THEY_ARE / images)
    batch = settings.batch
    if "batch" not in given:
        batch = changes["batch"] = fitting_batch(int(images * share), usual_batch)
    smaller = min(1.0, batch / usual_batch)
    for name in FOLLOWING[3:]:
        if hasattr(settings, name) and name not in given:
            adam = name in ADAM or settings is config.curriculum or getattr(settings, "optimiser", "sgd") == "adam"
            changes[name] = float(f"{getattr(settings, name) * (math.sqrt(smaller) if adam else smaller):.3g}")
    if config.preset != "smoke" and "epochs" not in given:
        changes["epochs"] = round(settings.epochs * min(MOST_EPOCHS, math.sqrt(AS_THEY_ARE / images)))
    return replace(settings, **changes)


def fitting_batch(images: int, usual: int) -> int:
    """The largest batch, ``usual`` or a power of two below, with at least 20 steps an epoch; 8 where none has."""
    batch = usual
    while batch > SMALLEST_BATCH and images < FEWEST_STEPS * batch:
        batch = 2 ** (math.ceil(math.log2(batch)) - 1)
    return min(usual, max(SMALLEST_BATCH, batch))


def smoke_images(request: TrainRequest, config: TrainConfig) -> int:
    """Training images for which the preset ``smoke`` takes about a minute on two cores, by FLOPs; 32 at least."""
    with torch.random.fork_rng(devices=[]):
        table = count_flops(BlockDropNet(request.network, wanted_policy(request, config)), request.preprocess.size)
    network = policy = 0.0  # FLOPs an image, in passes forward
    if request.initial is None:
        network += 3 * config.pretrain.epochs
    network += 2  # of the teacher
    network += 2 * (config.adapt.epochs + config.finetune.epochs)
    policy += 3 * (config.finetune.epochs + config.curriculum.epochs * config.curriculum.epoch_share)
    network += 2 * config.curriculum.epochs * config.curriculum.epoch_share
    return max(SMOKE_FEWEST, int(SMOKE_FLOPS / (network * table.full + policy * table.policy)))


def fitted_text(config: TrainConfig, images: int, given: Collection[str], phases: Collection[str]) -> str:
    """What follows the data's size in a run with these ``phases``, for a person."""
    texts = []
    for phase in (name for name in PHASES if name in phases):
        settings = getattr(config, phase)
        names = [name for name in ("batch", "epochs") if f"{phase}.{name}" not in given]
        if settings.epochs and names:
            texts.append(f"{phase} {', '.join(f'{name} {getattr(settings, name)}' for name in names)}")
    return (
        f"settings follow the {images} training images (presets are made for {AS_THEY_ARE} and more): "
        f"{'; '.join(texts) or 'whole epochs'}; learning rates in proportion. --set or an option overrides each"
    )
