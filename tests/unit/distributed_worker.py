"""What the processes of test_train_distributed.py run: ``python distributed_worker.py OUT``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from test_train_run import CONFIG, CutError, Recorder, request

from bdexport.architecture import ResNetSpec
from bdexport.cli.failures import explain
from bdexport.models.pair import BlockDropNet
from bdexport.train.data import Augmentation, DeviceImages
from bdexport.train.distributed import World, joined
from bdexport.train.methods import METHODS
from bdexport.train.phases import Phase, Setting
from bdexport.train.pipeline import train
from bdexport.train.state import generator_for

STEPS = 3
LONGER = replace(CONFIG, pretrain=replace(CONFIG.pretrain, epochs=10))
SHORT = replace(CONFIG, pretrain=replace(CONFIG.pretrain, epochs=1), curriculum=replace(CONFIG.curriculum, epochs=1))


def learned(phase_class: Callable[[Setting], Phase], world: World, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """The weights after three steps of a phase with batch norm in eval mode, and what the phase reported."""
    asked = request(Path("unused"))
    torch.manual_seed(0)
    model = BlockDropNet(ResNetSpec("cifar", "basic", (1, 1, 1), (8, 8, 16), "option_a", 10))
    setting = Setting(model, [], None, CONFIG, "cpu", False, generator_for(0, 0, 0, "cpu"), world)
    phase = phase_class(setting)
    phase.start()
    model.eval()  # each process has batch statistics of its own
    data = DeviceImages(asked.train.arrays(asked.preprocess), asked.train.labels, asked.preprocess, "cpu")
    batches = data.epoch(phase.batch, 1.0, Augmentation(), setting.generator, world)
    for step, batch in zip(range(steps), batches, strict=False):
        phase.at(0.5 + 0.1 * step)
        phase.step(batch)
    return dict(model.state_dict())


def together(out: Path, world: World) -> None:
    """Steps of every phase; runs from start to end; one that is cut off in all processes, and resumed."""
    weights = {phase.name: learned(phase, world) for phase in METHODS[CONFIG.method]}
    if world.leads:
        torch.save(weights, out / "steps.pt")
    train(request(out / "base", base_only=True), LONGER, Recorder(), world)
    train(request(out / "straight"), SHORT, Recorder(), world)
    try:
        train(request(out / "resumed"), SHORT, Recorder(cut_in=("finetune 2", 2)), world)
    except CutError:
        train(request(out / "resumed"), SHORT, Recorder(), world)


def fail(out: Path, world: World) -> None:
    """The second process alone fails, in the middle of an epoch."""
    reporter = Recorder() if world.leads else Recorder(cut_in=("adapt", 2))
    train(request(out / "failed"), SHORT, reporter, world)


if __name__ == "__main__":
    try:
        with joined("cpu") as both:
            together(Path(sys.argv[1]), both)
            fail(Path(sys.argv[1]), both)
    except BaseException as error:
        text, code = explain(error)
        if text:
            print(text, file=sys.stderr)
        sys.exit(code)
