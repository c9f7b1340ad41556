"""How long a run will take: from FLOPs and a first measurement before it, from its own epochs later on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy

import torch

from bdexport.models.flops import FlopsTable
from bdexport.train.phases import Phase, Setting
from bdexport.train.state import RunState

BACKWARD = 3.0  # a step that learns, over a forward pass
DROPPED = 0.6  # of a network's FLOPs run while blocks are dropped, roughly
MASKS = 2.0  # paths that the frozen network runs for each image that a policy learns from
PROBE_FLOPS = 2e10  # of the step that is timed beforehand
PROBE_BATCH = (8, 64)
PROBES = 3


def epoch_flops(phase: Phase, table: FlopsTable, images: int, validation: int) -> float:
    """FLOPs of one epoch, roughly: the proportions between phases are what matters."""
    network = MASKS * DROPPED
    if phase.learns_network:
        network = BACKWARD * (1.0 if phase.name == "pretrain" else DROPPED)
    if phase.name == "prime":
        network = 0.0
    policy = BACKWARD if phase.uses_policy or phase.name == "prime" else 0.0
    return (network * table.full + policy * table.policy) * images * phase.share + table.full * validation


class RunClock:
    """Counts a run's epochs against the clock; :meth:`left` is what remains, in seconds."""

    def __init__(self, setting: Setting, phases: Sequence[Phase], table: FlopsTable, images: int, validation: int):
        self._phases, self._teachers = list(phases), len(setting.teachers) or 1
        self._epochs = [epoch_flops(phase, table, images, validation) for phase in phases]
        config = setting.config
        self._teaching = 0.0
        if config.distillation_weight > 0 and config.distillation == "cached":
            self._teaching = 2 * self._teachers * table.full * images
        self._ending = table.full * (min(images, config.recalibrate_images) + 4 * validation)
        self._seconds: dict[int, tuple[float, int]] = {}  # of a phase: seconds of its epochs so far, and their number
        self._rate: float | None = None  # FLOPs a second of all epochs so far
        self._begun: float | None = None

    def probe(self, setting: Setting, table: FlopsTable, image_size: tuple[int, int]) -> None:
        """Time a step of the network on a few blank images: what is known before the first epoch."""
        low, high = PROBE_BATCH
        batch = max(low, min(high, int(PROBE_FLOPS / (BACKWARD * max(1, table.full)))))
        network = deepcopy(setting.model.network).train().requires_grad_(True)
        images = torch.zeros(batch, 3, *image_size, device=setting.device).to(memory_format=torch.channels_last)
        times = []
        for _ in range(PROBES):
            began = time.perf_counter()
            with setting.autocast():
                loss = network(images).float().sum()
            loss.backward()
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - began)
        self._rate = BACKWARD * table.full * batch / max(1e-9, min(times))  # the first one warms up

    def begin_epoch(self) -> None:
        """The clock starts; validation and saving count as well."""
        self._begun = time.perf_counter()

    def end_epoch(self, phase: int) -> None:
        """The clock stops."""
        if self._begun is None:
            return
        seconds, epochs = self._seconds.get(phase, (0.0, 0))
        self._seconds[phase] = seconds + time.perf_counter() - self._begun, epochs + 1
        flops = sum(self._epochs[index] * count for index, (_, count) in self._seconds.items())
        self._rate = flops / max(1e-9, sum(seconds for seconds, _ in self._seconds.values()))

    def left(self, state: RunState, taught: bool) -> float | None:
        """Seconds until the run's end from where ``state`` stands; None before anything was measured."""
        if self._rate is None:
            return None
        seconds = (self._ending + (0.0 if taught else self._teaching)) / self._rate
        for index in range(state.phase, len(self._phases)):
            epochs = self._phases[index].epochs - (state.epoch if index == state.phase else 0)
            known = self._seconds.get(index)
            of_one = self._epochs[index] / self._rate if known is None else known[0] / known[1]
            seconds += max(0, epochs) * of_one
        return seconds


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``: an estimate has no more digits than that."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
