"""How long a cell takes: as it took when ``--prepare`` made every call of it once, or estimated from a short pilot.

The estimate is rough: a few calls of PyTorch's eager full network, times what the whole field took beside it where both
were measured. It says what fits before anything is built; preparing says it better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bdexport.cli.console import to_plain
from bdexport.files import write_json
from bdexport.json_text import MalformedError, parse_json
from benchmarks.suite.networks import Network
from benchmarks.suite.plan import IMAGENET_MODELS, Cell, Cost, Share, SuiteConfig, least_rounds

FOOTPRINT_REPEATS = 3
PILOT_IMAGES = 8  # of a larger batch; times go with the images beyond it
PILOT_S = 0.5
FIELD_SHARE = 0.27  # mean time of a contestant, of PyTorch's eager full network at batch 1 (results of 2026-11-25)
ENGINES, FULL_BASELINES = 5, 6  # backends and precisions of ours on a CPU; engines of others
SETUP_S = {"trained": 6.0, "random": 6.0, "sweep": 12.0, "footprint": 0.0}  # ResNet-32's ..
SETUP_CALLS = {"trained": 60, "random": 60, "sweep": 1500, "footprint": 0}  # .. and so many of those calls more ..
LARGE_SETUP = 8  # .. over this at 224 x 224: fewer engines, and compiling does not grow with the image
FOOTPRINT_S = 2.5  # of one process
Eager = dict[tuple[str, int, int], float]  # s of one call of PyTorch's full network by model, images, threads
PREPARED, ESTIMATED = "pilot", "estimate"


class Pilots:
    """What cells took when they were prepared: ``WORK/pilots``, one JSON file for each cell.

    With it goes what PyTorch's eager full network took for one image at that time (``eager_s``): a machine that is busy
    with other things while it prepares is faster later.
    """

    def __init__(self, work: Path) -> None:
        self._folder = work / "pilots"

    def load(self, cell: Cell, key: Mapping[str, Any]) -> tuple[Cost, float] | None:
        """Cost and ``eager_s``; None for a cell that was not prepared under this key, or whose file is damaged."""
        try:
            data = parse_json(self._path(cell).read_bytes())
            if data["key"] != to_plain(dict(key)):
                return None
            rounds = None if data["rounds"] is None else int(data["rounds"])
            return Cost(float(data["setup_s"]), float(data["round_s"]), PREPARED, rounds), float(data["eager_s"])
        except (OSError, MalformedError, KeyError, TypeError, ValueError):
            return None

    def save(self, cell: Cell, key: Mapping[str, Any], cost: Cost, eager_s: float) -> None:
        """Whole or not at all."""
        write_json(self._path(cell), to_plain({"key": dict(key), "eager_s": eager_s, **asdict(cost)}))

    def clear(self) -> None:
        """Forget them all."""
        for path in self._folder.glob("*.json"):
            path.unlink()

    def _path(self, cell: Cell) -> Path:
        return self._folder / f"{cell.name}.json"


def estimated(cell: Cell, network: Network, config: SuiteConfig, known: Eager) -> Cost:
    """A rough :class:`Cost`, from a pilot of at most ``PILOT_IMAGES`` images; ``known`` keeps pilots already made."""
    engines = ENGINES if "bdexport" in config.kinds else 0
    if cell.usage == "footprint":
        return Cost(0.0, 2 * engines * FOOTPRINT_S, ESTIMATED, FOOTPRINT_REPEATS)
    levels = len(config.sweep) if cell.usage == "sweep" else 1
    executors = 1 if cell.usage == "random" else 2
    others = len(set(config.kinds) & {"torch", "compile", "onnxruntime", "openvino", "if-graph"})
    contestants = engines * (2 + executors * levels) + round(FULL_BASELINES * others / 5) + levels
    eager = eager_seconds(cell.batch, cell, network, known)
    single = eager_seconds(1, cell, network, known)
    warm = 1 + (config.warm_calls if FIELD_SHARE * eager < config.warm_below_s else 0)
    calls = SETUP_CALLS[cell.usage] // (LARGE_SETUP if cell.model in IMAGENET_MODELS else 1)
    setup = SETUP_S[cell.usage] + calls * single + 2 * contestants * FIELD_SHARE * eager
    return Cost(setup, contestants * warm * FIELD_SHARE * eager, ESTIMATED)


def scaled(cost: Cost, by: float) -> Cost:
    """The same for a machine that needs ``by`` times as long."""
    return replace(cost, setup_s=by * cost.setup_s, round_s=by * cost.round_s)


def eager_seconds(batch: int, cell: Cell, network: Network, known: Eager) -> float:
    """What a call of PyTorch's full network takes at this batch with the cell's threads: the mean, which other work on
    the machine lengthens as it does everything.
    """
    images = min(batch, PILOT_IMAGES)
    key = cell.model, images, cell.threads
    if key not in known:
        torch.set_num_threads(cell.threads)
        x = torch.zeros(images, 3, *network.checkpoint.preprocess.size)
        with torch.inference_mode():
            network.model.network(x)
            began, calls = perf_counter(), 0
            while not calls or perf_counter() - began < PILOT_S:
                network.model.network(x)
                calls += 1
        known[key] = (perf_counter() - began) / calls
    return known[key] * batch / images


def plan_table(cells: Sequence[Cell], costs: Sequence[Cost], shares: Sequence[Share], config: SuiteConfig) -> list[str]:
    """The plan as lines of text: what each cell needs, what it gets, and what all of them take."""
    lines = [f"{'cell':32} {'set up':>8} {'a round':>9} {'rounds':>7} {'seconds':>8}  from"]
    for cell, cost, share in zip(cells, costs, shares, strict=True):
        rounds = str(share.rounds) if share.rounds else "none"
        lines.append(
            f"{cell.name:32} {cost.setup_s:7.1f}s {cost.round_s:8.3f}s {rounds:>7} {share.seconds:7.0f}s  {cost.source}"
        )
    both = zip(cells, costs, strict=True)
    least = sum(cost.setup_s + (cost.rounds or least_rounds(cell, config)) * cost.round_s for cell, cost in both)
    given = sum(share.seconds for share in shares)
    out = [cell.name for cell, share in zip(cells, shares, strict=True) if not share.rounds]
    lines.append(
        f"{len(cells)} cells, with the least rounds of each: {least / 60:.1f} minutes; "
        f"of {config.minutes:g} minutes, {given / 60:.1f} are given out"
    )
    if out:
        lines.append(f"no time for {', '.join(out)}: all of them need --minutes {least / 60 + 0.5:.0f}")
    return lines
