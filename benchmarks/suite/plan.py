"""Which cells are measured, in which order, by whom, and how the time is shared out between them.

A cell is what is measured in turn with each other: one model, batch and number of threads, and who decides about the
blocks. Small networks and small batches come first, so that a run that is cut off has the cells that matter most.
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
KINDS = {
    "torch": "PyTorch eager, full and skipping blocks image by image",
    "compile": "torch.compile, full",
    "onnxruntime": "ONNX Runtime, full, fp32 and int8",
    "openvino": "OpenVINO, full, fp32, bf16 and int8",
    "if-graph": "one ONNX graph with an If per block",
    "cuda": "on a GPU: PyTorch's CUDA graphs and ONNX Runtime's CUDA provider, full",
    "bdexport": "bdexport with every backend, precision and executor",
}
SINGLE_IMAGE_ROUNDS, LARGE_IMAGE_ROUNDS = 20, 4  # times the least number of rounds at batch 1; at 224 x 224


@dataclass(frozen=True)
class SuiteConfig:
    """What is measured by default; about twenty minutes on one core."""

    models: tuple[str, ...] = MODELS
    batches: tuple[int, ...] = (1, 8, 64, 256)
    threads: tuple[int, ...] = (1,)
    kinds: tuple[str, ...] = tuple(KINDS)
    minutes: float = 20.0
    sweep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the blocks, one image
    random_kept: float = 0.33  # of the blocks, where no trained policy is given
    checkpoints: dict[str, str] = field(default_factory=lambda: dict(ZOO))
    dataset: str = "cifar10-samples"  # whose test images the trained cells run
    data: Path | None = None
    images: int = 200  # that the trained cells draw from
    masks: int = 32  # random masks of each number of kept blocks
    calibration_images: int = 128  # int8's scales are gathered on
    least_rounds: int = 5  # of every cell, see least_rounds(); one that cannot have as many is not measured
    most_rounds: int = 1000
    warm_calls: int = 1  # before the timed call of a turn: its own weights in the caches, as where it alone runs ..
    warm_below_s: float = 0.05  # .. where a call is shorter; in a longer one, loading them is a small part
    pause_s: float = 0.003  # between turns with several threads: until the pool before has stopped spinning
    compile_batches: tuple[int, ...] = (1,)  # torch.compile takes about a minute for each
    large_image_batches: tuple[int, ...] = (1,)  # of those asked for, the ones at 224 x 224 within ``minutes``
    footprint: bool = True  # load time and memory


QUICK = SuiteConfig(
    models=("resnet32",),
    batches=(1, 8),
    minutes=3.0,
    sweep=(0.2, 0.6, 1.0),
    compile_batches=(),
)


@dataclass(frozen=True)
class Cell:
    """What one measurement covers. ``usage``: "trained": the policy decides; "random": random masks with one share of
    the blocks kept; "sweep": the same with several; "footprint": load time and memory.
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
    """Every cell in order: by family, then kind and batch, then model; the footprint last of its family.

    Sweep and footprint have the first number of threads only: how cost grows is drawn once.
    """
    found: list[Cell] = []
    for family in (CIFAR_MODELS, IMAGENET_MODELS):
        models = [model for model in config.models if model in family]
        large = family is IMAGENET_MODELS
        batches = [batch for batch in config.batches if not large or batch in config.large_image_batches]
        for kind, batch in _rows(batches):
            threads = config.threads if kind == "usage" else config.threads[:1]
            if kind == "footprint" and not (config.footprint and "bdexport" in config.kinds):
                continue
            found += [Cell(model, _usage(config, model, kind), batch, count) for count in threads for model in models]
    return found


def _rows(batches: Sequence[int]) -> Iterable[tuple[str, int]]:
    """(kind, batch): single images first, what they cost and how it grows; then the larger batches."""
    ordered = sorted(set(batches))
    if 1 in ordered:
        yield from (("usage", 1), ("sweep", 1))
    yield from (("usage", batch) for batch in ordered if batch > 1)
    yield "footprint", 1


def _usage(config: SuiteConfig, model: str, kind: str) -> Usage:
    if kind == "usage":
        return "trained" if model in config.checkpoints else "random"
    return "sweep" if kind == "sweep" else "footprint"


def least_rounds(cell: Cell, config: SuiteConfig) -> int:
    """Of one cell: short calls vary more, and single images matter most, so that smaller batches have more of them."""
    if cell.usage == "sweep":
        return 2 * config.least_rounds
    times = LARGE_IMAGE_ROUNDS if cell.model in IMAGENET_MODELS else SINGLE_IMAGE_ROUNDS
    return config.least_rounds * max(1, times // cell.batch)


@dataclass(frozen=True)
class Cost:
    """What a cell needs, in s: ``setup_s`` once, ``round_s`` for everybody's turn; ``rounds`` where they are fixed.

    ``source``: "pilot", measured when it was prepared, or "estimate".
    """

    setup_s: float
    round_s: float
    source: str
    rounds: int | None = None


@dataclass(frozen=True)
class Share:
    """What a cell gets. ``rounds`` 0: not even the least number fits."""

    rounds: int
    seconds: float  # setting up included


def share_out(costs: Sequence[Cost], seconds: float, least: Sequence[int], most: int) -> list[Share]:
    """How many rounds each cell gets within ``seconds``.

    In order, each cell gets its ``least`` number if that fits in what is left. What remains goes to all of those, in
    rounds that are proportional to 1 / sqrt(a round's seconds), up to ``most``: for the time that is spent, this makes
    the sum of the cells' variances smallest.
    """
    left, chosen = seconds, []
    for index, cost in enumerate(costs):
        need = cost.setup_s + (cost.rounds or least[index]) * cost.round_s
        if need <= left:
            left -= need
            chosen.append(index)
    rounds = {index: float(costs[index].rounds or least[index]) for index in chosen}
    growing = [index for index in chosen if costs[index].rounds is None]
    while growing and left > 1e-6:
        weights = {index: max(costs[index].round_s, 1e-6) ** 0.5 for index in growing}
        total, spent = sum(weights.values()), 0.0
        for index, weight in weights.items():
            room = max(0.0, most - rounds[index]) * max(costs[index].round_s, 1e-6)
            given = min(left * weight / total, room)
            rounds[index] += given / max(costs[index].round_s, 1e-6)
            spent += given
        left -= spent
        growing = [index for index in growing if rounds[index] < most - 1e-6]
    whole = {index: int(number + 1e-6) for index, number in rounds.items()}
    return [
        Share(whole[index], cost.setup_s + whole[index] * cost.round_s) if index in whole else Share(0, 0.0)
        for index, cost in enumerate(costs)
    ]
