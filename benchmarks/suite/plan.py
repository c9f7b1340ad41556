"""Which cells are measured, in which order, and what each may take.

A cell is one table of the result: one model, batch and number of threads, and who decides about the blocks. Its
contestants are measured in turn with each other. Small networks and small batches come first, so that a run that is cut
off has the cells that matter most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Usage = Literal["trained", "random", "sweep", "footprint"]
CIFAR_MODELS, IMAGENET_MODELS = ("resnet32", "resnet56", "resnet110"), ("resnet50", "resnet101")
MODELS = CIFAR_MODELS + IMAGENET_MODELS
ZOO = {"resnet32": "zoo:resnet32-cifar10"}  # trained policies that ship with bdexport


@dataclass(frozen=True)
class SuiteConfig:
    """What is measured by default; about twenty minutes on one core."""

    models: tuple[str, ...] = MODELS
    batches: tuple[int, ...] = (1, 8, 64, 256)
    threads: tuple[int, ...] = (1,)
    minutes: float = 20.0
    sweep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the blocks, at batch 1
    random_kept: float = 0.33  # of the blocks, where no trained policy is given
    checkpoints: dict[str, str] = field(default_factory=lambda: dict(ZOO))
    dataset: str = "cifar10-samples"  # whose test images the trained cells run
    data: Path | None = None
    images: int = 200  # that the trained cells draw from
    masks: int = 32  # random masks of each number of kept blocks
    least_rounds: int = 5  # a contestant or cell that cannot have as many in its time is left out, and named
    most_rounds: int = 2000
    cell_seconds: float = 90.0  # at most; a share of what is left of ``minutes`` otherwise
    warm_calls: int = 1  # before the timed call of a turn: its own weights in the caches, as where it alone runs
    pause_s: float = 0.003  # between turns with several threads: until the pool before has stopped spinning
    compile_batches: tuple[int, ...] = (1,)  # torch.compile takes about a minute for each
    large_image_batches: tuple[int, ...] = (1,)  # of those asked for, the ones at 224 x 224 within ``minutes``


QUICK = SuiteConfig(
    models=("resnet32",),
    batches=(1, 8),
    minutes=3.0,
    sweep=(0.2, 0.6, 1.0),
    cell_seconds=20.0,
    compile_batches=(),
)


@dataclass(frozen=True)
class Cell:
    """One table. ``usage``: "trained": the policy decides; "random": random masks with one share of the blocks kept;
    "sweep": the same with several; "footprint": load time and memory.
    """

    model: str
    usage: Usage
    batch: int
    threads: int

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"{self.model}-{self.usage}-b{self.batch}-t{self.threads}"


def cells(config: SuiteConfig) -> list[Cell]:
    """Every cell in order: by family, then kind and batch, then model; the footprint last of its family."""
    found: list[Cell] = []
    for family in (CIFAR_MODELS, IMAGENET_MODELS):
        models = [model for model in config.models if model in family]
        large = family is IMAGENET_MODELS
        batches = [batch for batch in config.batches if not large or batch in config.large_image_batches]
        for kind, batch in _rows(batches):
            found += [
                Cell(model, _usage(config, model, kind), batch, threads)
                for threads in config.threads
                for model in models
            ]
    return found


def _rows(batches: Sequence[int]) -> Iterable[tuple[str, int]]:
    """(kind, batch): single images first, what they cost and how it grows; then the larger batches."""
    ordered = sorted(set(batches))
    if 1 in ordered:
        yield from (("usage", 1), ("sweep", 1))
    yield "footprint", 1
    yield from (("usage", batch) for batch in ordered if batch > 1)


def _usage(config: SuiteConfig, model: str, kind: str) -> Usage:
    if kind == "usage":
        return "trained" if model in config.checkpoints else "random"
    return "sweep" if kind == "sweep" else "footprint"


def seconds_for(left: int, remaining_s: float, most_s: float) -> float:
    """What the next of ``left`` cells may take: its share of what remains, at most ``most_s``; 0 when time is up."""
    return max(0.0, min(most_s, remaining_s / max(1, left)))
