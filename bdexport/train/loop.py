"""The loop around the phases: epochs, validation, metrics, saving and resuming."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from bdexport.errors import DivergedError, TrainingError
from bdexport.evaluate import Outcome, Strategy, run_decided, run_masks
from bdexport.models.pair import BlockDropNet
from bdexport.train.choice import choose, keep_diverse, mean_reward, stop_on_collapse
from bdexport.train.data import DeviceImages, TrainingData, steps_per_epoch
from bdexport.train.distributed import World
from bdexport.train.eta import RunClock, duration
from bdexport.train.events import EventLog
from bdexport.train.methods import phases_of
from bdexport.train.phases import Phase, Setting
from bdexport.train.reporter import Reporter
from bdexport.train.state import STATE_FILE, RunState, generator_for, save_state, weights_of
from bdexport.train.teacher import teacher_logits


def run_phases(
    setting: Setting,
    data: TrainingData,
    state: RunState,
    run: Path,
    reporter: Reporter,
    before_learning: Callable[[], None] = lambda: None,
    clock: RunClock | None = None,
) -> None:
    """Train from where ``state`` stands to the end of the last phase, saving ``state`` after every epoch.

    ``before_learning`` is called whenever a phase begins or goes on that learns on the base: all but ``pretrain``.
    ``clock`` estimates what is left.
    """
    events = EventLog(run, len(state.history), writes=setting.world.leads)
    if events.note is not None:
        reporter.note(events.note)
    try:
        _run_phases(setting, data, state, run, reporter, events, before_learning, clock)
    finally:
        events.close()


def _run_phases(
    setting: Setting,
    data: TrainingData,
    state: RunState,
    run: Path,
    reporter: Reporter,
    events: EventLog,
    before_learning: Callable[[], None],
    clock: RunClock | None,
) -> None:
    phases = [phase(setting) for phase in phases_of(setting.config)]
    if state.phase > len(phases) or (state.phase < len(phases) and state.epoch > phases[state.phase].epochs):
        raise TrainingError(f"the run's {STATE_FILE} is beyond its last epoch", remedy="train into another folder")
    for index in range(state.phase, len(phases)):
        phase = phases[index]
        if phase.name != "pretrain":
            before_learning()
        if phase.epochs > state.epoch:
            _enter(phase, setting, state, data, run, reporter)
        if state.epoch > 0:  # resumed: what ended the run by collapse ends it again
            stop_on_collapse(phase, state, reporter)
            keep_diverse(phase, state, reporter)
        for epoch in range(state.epoch, phase.epochs):
            setting.generator = generator_for(setting.config.seed, index, epoch, setting.device)
            left = None
            if clock is not None:
                left = clock.left(state, setting.teacher_logits is not None)
                clock.begin_epoch()
            row = _train_epoch(phase, epoch, data, reporter, left)
            setting.world.settle(setting.model)
            _check_weights(phase)
            row |= _validate(phase, setting, data)
            choose(phase, setting, state, row)
            _remember(state, setting, phase, index, epoch + 1)
            state.history.append(row)
            events.add(row, len(state.history))  # before the state: what a crash leaves in between is purged
            reporter.line(row)
            keep_diverse(phase, state, reporter)
            setting.world.once(lambda: save_state(run, state))
            if clock is not None:
                clock.end_epoch(index)
            stop_on_collapse(phase, state, reporter)
        state.phase, state.epoch, state.optimisers = index + 1, 0, []
        _remember_weights(state, setting)


def _enter(phase: Phase, setting: Setting, state: RunState, data: TrainingData, run: Path, reporter: Reporter) -> None:
    """Prepare a phase; the network as it is when BlockDrop's own phases begin becomes the teacher."""
    config = setting.config
    taught = phase.name != "pretrain" and config.distillation_weight > 0
    if not setting.teachers and taught:
        setting.teachers = [frozen_copy(setting.model)]
        state.teacher = weights_of(setting.teachers[0])
    if setting.teachers and setting.teacher_logits is None and taught and config.distillation == "cached":
        mirrored = config.mirrored_teacher and data.augmentation.flip
        setting.teacher_logits = teacher_logits(setting, data.train, run, mirrored, reporter)
    if state.epoch == 0:
        phase.begin(data, reporter.note)
        state.fixed_mask, state.order = setting.fixed_mask, setting.order
    phase.start()
    for optimiser, saved in zip(phase.optimisers, state.optimisers, strict=False):
        try:
            optimiser.load_state_dict(saved)
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"the run's {STATE_FILE} holds other optimisers than {phase.name}'s ({error})",
                remedy="train into another folder",
            ) from error


def _train_epoch(
    phase: Phase, epoch: int, data: TrainingData, reporter: Reporter, left: float | None
) -> dict[str, Any]:
    setting = phase.setting
    whole = setting.config.whole_epochs
    steps = steps_per_epoch(len(data.train), phase.batch, phase.share, whole)
    sums: dict[str, float] = {}
    images_seen = 0
    started = time.perf_counter()
    batches = data.train.epoch(phase.batch, phase.share, data.augmentation, setting.generator, setting.world, whole)
    until = "" if left is None else f", about {duration(left)} left of the run"
    with reporter.epoch(f"{phase.name} {epoch + 1}/{phase.epochs}{until}", steps) as advance:
        for step, batch in enumerate(batches):
            phase.at(epoch + step / steps)
            for name, value in phase.step(batch).items():
                sums[name] = sums.get(name, 0.0) + value
            images_seen += len(batch.labels) * setting.world.size
            advance()
    seconds = time.perf_counter() - started
    return {
        "phase": phase.name,
        "epoch": epoch + 1,
        "train": _averages(sums, steps, setting.world),
        "open_blocks": phase.opened(epoch) if phase.uses_policy else None,
        "seconds": round(seconds, 2),
        "images_per_s": round(images_seen / seconds, 1),
    }


def _averages(sums: dict[str, float], steps: int, world: World) -> dict[str, float]:
    """Means over an epoch's steps and over the processes."""
    means = world.mean(torch.tensor([value / steps for value in sums.values()], dtype=torch.float64))
    return dict(zip(sums, means.tolist(), strict=True))


def _check_weights(phase: Phase) -> None:
    """The last step of an epoch can spoil the weights without a loss that shows it: they must not be saved as good."""
    for name, tensor in phase.setting.model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(f"{phase.name}: {name} is not finite", remedy=phase.calmer(name.partition(".")[0]))


def _validate(phase: Phase, setting: Setting, data: TrainingData) -> dict[str, Any]:
    outcome = validation_outcome(setting, data.validation, phase.strategy())
    used = outcome.blocks_used
    return {
        "validation": {
            "accuracy": outcome.accuracy,
            "reward": mean_reward(outcome, setting),
            "blocks_used": {"mean": float(used.mean()), "std": float(used.std())},
            "unique_masks": outcome.unique_masks,
        }
    }


def validation_outcome(setting: Setting, images: DeviceImages, strategy: Strategy | None) -> Outcome:
    """One pass over a split in eval mode, leaving each module's training mode as it was; each process takes a shard.

    ``strategy`` gives the masks; None leaves the decision to the model.
    """
    model = setting.model
    modes = {module: module.training for module in model.modules()}  # a frozen backbone may have a learning head
    model.eval()
    world = setting.world
    batches = images.batches(setting.config.evaluation_batch, world=world)
    with setting.autocast():
        outcome = run_decided(model, batches) if strategy is None else run_masks(model, batches, strategy)
    outcome = outcome.over(world.gathered)
    for module, training in modes.items():
        module.training = training
    return outcome


def _remember(state: RunState, setting: Setting, phase: Phase, index: int, epoch: int) -> None:
    _remember_weights(state, setting)
    state.phase, state.epoch = index, epoch
    state.optimisers = [optimiser.state_dict() for optimiser in phase.optimisers]


def _remember_weights(state: RunState, setting: Setting) -> None:
    state.model = weights_of(setting.model)
    state.classifier, state.critic = weights_of(setting.classifier), weights_of(setting.critic)
    state.price, state.memory = setting.price, list(setting.memory or ())


def frozen_copy(model: BlockDropNet) -> Any:
    """The network as it is now, in eval mode, without gradients."""
    return deepcopy(model.network).eval().requires_grad_(False)


def restore(state: RunState, setting: Setting) -> None:
    """Put a loaded state's weights and teacher in place. Weights that do not fit: :class:`TrainingError`."""
    try:
        setting.model.load_state_dict(state.model)
        if state.classifier:
            setting.classifier.load_state_dict(state.classifier)
            setting.critic.load_state_dict(state.critic)
            setting.price = state.price
            memory = [part.to(setting.device) for part in state.memory]
            setting.memory = (memory[0], memory[1]) if memory else None
        setting.fixed_mask, setting.order = state.fixed_mask, state.order
        if state.teacher is not None:
            teacher = frozen_copy(setting.model)
            teacher.load_state_dict(state.teacher)
            setting.teachers = [teacher]
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise TrainingError(
            f"the run's {STATE_FILE} does not fit its network ({first})", remedy="train into another folder"
        ) from error
    torch.manual_seed(setting.config.seed)
