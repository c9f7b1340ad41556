"""Long use: eight callers at once for as long as the campaign has time, results bit for bit, memory flat."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
from bundles import pixels

import bdexport
from bdexport.runtime import Orchestrator, Result
from bdexport.runtime.orchestrator import executors_of
from campaign.cases import Kind, Tally, once
from campaign.memory import resident_mb
from campaign.networks import backends, build, model_of

CALLERS = 8
CALLS = 160  # of one case
BATCHES = (1, 1, 1, 7)
WARM_CASES = 60  # allocators and thread pools have grown to their size by then
MOST_GROWTH_MB = 48.0


class Soak(Kind):
    """Every backend with every executor; now and then a bundle is opened and closed beside the calls."""

    name: ClassVar[str] = "soak"
    about: ClassVar[str] = "images by eight callers at once, compared bit for bit; memory after warm-up"
    share: ClassVar[float] = 1.5
    limit_s: ClassVar[float] = 60.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cases, self.warm_mb = 0, 0.0
        with once(folder / "good") as making:
            if making is not None:
                for backend in backends():
                    build(making / backend, model_of(3), backend, paths=2)
        ends = np.cumsum([0, *(BATCHES[number % len(BATCHES)] for number in range(400))])
        images = pixels(int(ends[-1]), seed=3)
        self.calls = [images[begin:end] for begin, end in pairwise(ends)]
        self.loaded: list[tuple[str, Orchestrator, list[Result]]] = []
        for backend in backends():
            orchestrator = bdexport.load(folder / "good" / backend, threads=1, fused=True)
            for executor, each in executors_of(orchestrator).items():
                self.loaded.append((f"{backend} {executor}", each, [each(call) for call in self.calls]))

    def case(self, random: Random, scratch: Path) -> Tally:
        """Calls in a random order, by eight threads, of one orchestrator."""
        name, orchestrator, expected = random.choice(self.loaded)
        chosen = [random.randrange(len(self.calls)) for _ in range(CALLS)]
        tally = Tally()
        with ThreadPoolExecutor(CALLERS) as pool:
            results = list(pool.map(lambda number: orchestrator(self.calls[number]), chosen))
        for number, result in zip(chosen, results, strict=True):
            same = np.array_equal(result.logits, expected[number].logits)
            if same and np.array_equal(result.masks, expected[number].masks):
                tally.right += len(result.logits)
            else:
                tally.failures.append(f"{name}: call {number} gives other results than alone")
        if random.random() < 0.1:
            backend = random.choice(backends())
            with bdexport.load(self.folder / "good" / backend, threads=1) as other:
                tally.check(bool(np.isfinite(other(self.calls[0]).logits).all()), f"{backend}: logits are not finite")
        self._check_memory(tally)
        return tally

    def _check_memory(self, tally: Tally) -> None:
        self.cases += 1
        if self.cases % WARM_CASES == 0:
            gc.collect()
            now = resident_mb()
            if self.cases == WARM_CASES:
                self.warm_mb = now
            grown = now - self.warm_mb
            tally.check(grown <= MOST_GROWTH_MB, f"memory grew by {grown:.0f} MB since case {WARM_CASES}")
