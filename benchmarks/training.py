"""How fast training is: images per second of each phase, and which share of the machine's peak that is.

    python benchmarks/training.py [--arch resnet32] [--batch 256] [--threads 2] [--device cpu] [--precision bf16]
                                  [--keep 0.5] [--rounds 5] [--steps 4] [--warmup 0] [--json FILE]

The steps are those of ``bdexport train --preset cpu`` (bdexport/train/phases/), augmentation included, on random
images; time does not depend on what they show. ``--keep`` is the share of blocks that the policy's samples keep. Each
phase has a copy of the network; phases take turns, ``--steps`` steps each, after a turn and ``--warmup`` steps that
are not counted (a GPU needs about 100: kernels are chosen anew for every number of images that a block runs on). The
speed is the median over the rounds. fp32 is without TF32. ``FLOPs`` are those of the convolutions and matrix products
that a step really runs, backward pass included, as torch counts them; the peak is what one large matrix product
reaches in the same precision. The JSON is written after each round. Prints a table last.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gpu_common import ResultFile
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from bdexport.architecture import policy_spec, resnet_spec
from bdexport.config import TrainConfig, preset
from bdexport.models.pair import BlockDropNet
from bdexport.preprocess import Preprocess
from bdexport.report.benchmarks import TRAINING
from bdexport.train.data import Augmentation, Batch, DeviceImages
from bdexport.train.methods import METHODS
from bdexport.train.phases import Phase, Setting
from bdexport.train.state import generator_for

COUNTED_STEPS = 4  # whose FLOPs are counted
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices that the peak is measured with


class Turn:
    """One phase with a network and a stream of batches of its own."""

    def __init__(self, phase: Phase, data: DeviceImages) -> None:
        self.phase = phase
        self.batches = self._endless(data)
        phase.start()
        # The middle of the phase: all blocks are open, the learning rate is what it is.
        phase.at(max(1.0, phase.epochs / 2))

    def _endless(self, data: DeviceImages) -> Iterator[Batch]:
        while True:
            yield from data.epoch(self.phase.batch, 1.0, Augmentation(), self.phase.setting.generator)

    def seconds(self, steps: int) -> float:
        """Time of so many steps."""
        _wait(self.phase.setting.device)
        started = perf_counter()
        for _ in range(steps):
            self.phase.step(next(self.batches))
        _wait(self.phase.setting.device)
        return perf_counter() - started

    def flops(self, steps: int) -> float:
        """FLOPs of a step, mean."""
        with FlopCounterMode(display=False) as counter:
            self.seconds(steps)
        return float(counter.get_total_flops()) / steps


def turns(arguments: argparse.Namespace) -> dict[str, Turn]:
    """Every phase, ready to go."""
    spec = resnet_spec(arguments.arch)
    config = _config(arguments.batch, arguments.keep, spec.num_blocks)
    torch.manual_seed(0)
    policy = replace(policy_spec(spec), input_pool=config.policy.input_pool or 1)
    model = BlockDropNet(spec, policy)
    torch.nn.init.constant_(model.policy.fc.bias, config.policy.initial_keep_logit)
    torch.nn.init.zeros_(model.policy.fc.weight)
    device = arguments.device
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = _images(max(2 * arguments.batch, 1024), spec.image_size, spec.num_classes, device)
    taught = torch.randn(len(data), spec.num_classes, device=device)

    def setting() -> Setting:
        bf16 = arguments.precision == "bf16"
        generator = generator_for(0, 0, 0, device)
        return Setting(deepcopy(model), [], taught, config, device, bf16, generator)

    return {phase.name: Turn(phase(setting()), data) for phase in METHODS[config.method]}


def _config(batch: int, keep: float, num_blocks: int) -> TrainConfig:
    """The ``cpu`` preset with this batch; learning rates of zero, so that masks keep what they keep at the start."""
    config = preset("cpu", num_blocks)
    bound = config.policy.finetune_bound_start
    open_keep = min(max((keep - (1 - bound)) / (2 * bound - 1), 1e-3), 1 - 1e-3)  # undoes the exploration bound
    return replace(
        config,
        pretrain=replace(config.pretrain, batch=batch, epochs=10, learning_rate=0.0),
        prime=replace(config.prime, batch=batch, epochs=10, learning_rate=0.0),
        adapt=replace(config.adapt, batch=batch, epochs=10, learning_rate=0.0, keep_low=keep, keep_high=keep),
        curriculum=replace(config.curriculum, batch=batch, epochs=10, learning_rate=0.0),
        finetune=replace(config.finetune, batch=batch, epochs=10, network_learning_rate=0.0, policy_learning_rate=0.0),
        policy=replace(
            config.policy,
            exploration_bound=bound,
            finetune_bound_end=bound,
            initial_keep_logit=math.log(open_keep / (1 - open_keep)),
        ),
    )


def _images(count: int, side: int, classes: int, device: str) -> DeviceImages:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return DeviceImages(images, rng.integers(0, classes, count), Preprocess((side, side)), device)


def peak_flops(device: str, precision: str, rounds: int = 7) -> float:
    """FLOPs per second of one large matrix product, the best of so many."""
    size = MATRIX[device.split(":")[0]]
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = math.inf
    for _ in range(rounds):
        _wait(device)
        started = perf_counter()
        left @ right
        _wait(device)
        best = min(best, perf_counter() - started)
    return 2 * size**3 / best


def measure(arguments: argparse.Namespace, report: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Images/s, FLOPs/s and share of peak, by phase; the phases take turns. ``report`` gets the rows of each round."""
    ready = turns(arguments)
    # The first turn is a warm-up. Counting makes a step several times as slow, so that only a few are counted.
    flops = {name: turn.flops(min(arguments.steps, COUNTED_STEPS)) for name, turn in ready.items()}
    for turn in ready.values():
        turn.seconds(arguments.warmup)
    times: dict[str, list[float]] = {name: [] for name in ready}
    peaks, rows = [], []
    for _ in range(arguments.rounds):
        peaks.append(peak_flops(arguments.device, arguments.precision))
        for name, turn in ready.items():
            times[name].append(turn.seconds(arguments.steps) / arguments.steps)
        peak = float(np.median(peaks))
        rows = [_row(name, values, flops[name], peak, arguments.batch) for name, values in times.items()]
        report(rows)
    return rows


def _row(name: str, seconds: list[float], flops: float, peak: float, batch: int) -> dict[str, Any]:
    """One phase: ``seconds`` of a step in each round, ``flops`` of a step."""
    median = float(np.median(seconds))
    return {
        "phase": name,
        "images_per_s": batch / median,
        "images_per_s_range": [batch / max(seconds), batch / min(seconds)],
        "flops_per_image": flops / batch,
        "flops_per_s": flops / median,
        "peak_flops_per_s": peak,
        "share_of_peak": flops / median / peak,
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False
    names = ("arch", "batch", "threads", "device", "precision", "keep", "rounds", "steps", "warmup")
    settings = {name: getattr(arguments, name) for name in names}
    file = ResultFile(arguments.json, TRAINING, settings, arguments.device)
    rows = measure(arguments, file.write)
    file.write(rows, complete=True)
    title = f"{arguments.arch}, batch {arguments.batch}, {arguments.precision}, {arguments.device}"
    table = Table("phase", title=f"{title}, {arguments.threads} threads, {arguments.keep:.0%} of blocks kept")
    for column in ("images/s", "slowest..fastest", "MFLOPs/image", "GFLOPs/s", "of peak"):
        table.add_column(column, justify="right")
    for row in rows:
        slowest, fastest = row["images_per_s_range"]
        table.add_row(
            *(row["phase"], f"{row['images_per_s']:.0f}", f"{slowest:.0f}..{fastest:.0f}"),
            *(f"{row['flops_per_image'] / 1e6:.0f}", f"{row['flops_per_s'] / 1e9:.0f}"),
            f"{row['share_of_peak']:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
