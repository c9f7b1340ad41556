"""A small network on real digits that trains in seconds, and a reporter that can cut a run off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bdexport.architecture import ResNetSpec
from bdexport.checkpoint import load_checkpoint
from bdexport.config import (
    AdaptConfig,
    CurriculumConfig,
    FinetuneConfig,
    PolicyConfig,
    PretrainConfig,
    PrimeConfig,
    TrainConfig,
)
from bdexport.dataset import load_dataset
from bdexport.preprocess import Preprocess
from bdexport.train.request import TrainRequest

CONFIG = TrainConfig(
    preset="smoke",
    precision="fp32",
    distillation_weight=0.5,
    distillation="cached",
    recalibrate_images=200,
    pretrain=PretrainConfig(epochs=5, batch=32, learning_rate=0.1),
    adapt=AdaptConfig(epochs=1, batch=64),
    curriculum=CurriculumConfig(epochs=2, batch=64, blocks_per_epoch=2, epoch_share=0.3),
    finetune=FinetuneConfig(epochs=2, batch=64),
    policy=PolicyConfig(target_blocks=2.0, reward="probability"),
)
MARGINAL = replace(
    CONFIG,
    prime=PrimeConfig(epochs=1, batch=64),
    adapt=replace(CONFIG.adapt, levels="3,2,1", order_images=64),
    curriculum=CurriculumConfig(epochs=1, batch=64, epoch_share=0.5),
    finetune=FinetuneConfig(epochs=2, batch=64, level_share=0.3),
    policy=PolicyConfig(estimator="marginal", learns="head", hidden=16, target_blocks=2.0, memory=256, lessons=4),
)


class CutError(Exception):
    """Stands for the moment a run is killed."""


class Recorder:
    """Collects lines and notes; can end the run in the middle of an epoch."""

    def __init__(self, cut_in: tuple[str, int] | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.cut_in = cut_in

    @contextmanager
    def epoch(self, title: str, _steps: int) -> Iterator[Callable[[], None]]:
        step = 0

        def advance() -> None:
            nonlocal step
            step += 1
            if self.cut_in is not None and title.startswith(self.cut_in[0]) and step == self.cut_in[1]:
                raise CutError

        yield advance

    def line(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def note(self, text: str) -> None:
        self.notes.append(text)


def request(out: Path, **changes: Any) -> TrainRequest:
    """A network of three blocks on 12x12 digits."""
    return replace(
        TrainRequest(
            network=ResNetSpec("cifar", "basic", (1, 1, 1), (8, 8, 16), "option_a", 10),
            preprocess=Preprocess(size=(12, 12)),
            train=load_dataset("digits", None, "train", limit=512),
            validation=load_dataset("digits", None, "validation"),
            out=out,
            device="cpu",
        ),
        **changes,
    )


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path).state
