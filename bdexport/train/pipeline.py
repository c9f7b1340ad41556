"""A whole training run: data and network in, ``RUN/model.safetensors`` out; resumes a run that was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from bdexport.config import TrainConfig
from bdexport.dataset import unnamed_classes
from bdexport.errors import DivergedError, TrainingError
from bdexport.files import holding
from bdexport.models.flops import count_flops
from bdexport.models.policy_size import cost_text
from bdexport.train.base import keep_base
from bdexport.train.checks import agree, check_can_be_saved, check_same_run, checked
from bdexport.train.data import augmentation_for, steps_per_epoch
from bdexport.train.data_size import FEWEST_STEPS, fitting_batch
from bdexport.train.distributed import ALONE, World, check_batches
from bdexport.train.eta import RunClock, duration
from bdexport.train.finish import finish, with_last_good
from bdexport.train.loop import restore, run_phases
from bdexport.train.memory import check_memory, memory_explained, memory_plan
from bdexport.train.methods import phases_of
from bdexport.train.phases import Phase, Setting
from bdexport.train.prepare import bytes_to_load, chosen_device, chosen_precision, new_setting, training_data
from bdexport.train.reporter import Reporter
from bdexport.train.request import TrainRequest, just_pruned, learns_decisions
from bdexport.train.state import MODEL_FILE, STATE_FILE, RunState, load_state, save_metrics


def train(request: TrainRequest, config: TrainConfig, reporter: Reporter, world: World = ALONE) -> Path:
    """Run every phase and write the chosen model; returns its path.

    Of several processes each calls this with its ``world`` (:func:`bdexport.train.distributed.joined`).
    Raises TrainingError (settings that differ from the run's, NaN loss, collapse, no memory), DatasetError, and
    OutputError where another process is training into that folder.
    """
    config = checked(request, config)
    device, device_reason = chosen_device(request.device, world)
    bf16, bf16_reason = chosen_precision(config, device)
    setting = new_setting(request, config, device, bf16)
    setting.world = world
    with torch.random.fork_rng(devices=[]):  # asked for their batches only; those that learn draw their own weights
        phases = [phase(setting) for phase in phases_of(config)]
    check_batches({f"{phase.name}.batch": phase.batch for phase in phases if phase.epochs}, world)
    check_same_run(request, config, world)
    world.once(lambda: check_can_be_saved(request, config))
    with ExitStack() as held:
        world.once(lambda: held.enter_context(holding(request.out)))
        resumed = agree(request, config, world)
        reporter.note(f"device: {device} ({device_reason}); {'bf16' if bf16 else 'fp32'} ({bf16_reason})")
        for note in request.notes:
            reporter.note(note)
        return _run(request, config, setting, phases, resumed, reporter)


def _run(
    request: TrainRequest,
    config: TrainConfig,
    setting: Setting,
    phases: Sequence[Phase],
    resumed: bool,
    reporter: Reporter,
) -> Path:
    """What is left of the run, in a folder that is this run's."""
    world = setting.world
    if world.size > 1:
        reporter.note(f"{world.size} processes, each with its shard of every batch")
    state, has_model = _standing(request, setting, resumed, reporter)
    if state.finished and has_model:
        world.once(lambda: save_metrics(request.out, state))  # a report reads them: mended, if they were damaged
        reporter.note(f"{request.out} is complete already")
        return request.out / MODEL_FILE
    for note in [*_doubts(request, config), *_few_steps(request, config, phases[state.phase :])]:
        reporter.note(note)
    augmentation = augmentation_for(request.train.name, config.augment)
    reporter.note(f"augmentation: {augmentation.text()}")
    table = count_flops(setting.model, request.preprocess.size)
    if learns_decisions(request, config) and setting.model.gates is None:
        reporter.note(cost_text(table, config.policy.target_blocks))
    plan = memory_plan(setting, request.preprocess.size, bytes_to_load(request, setting.device))
    check_memory(plan, phases[state.phase :], reporter.note)

    def running() -> Phase | None:
        return phases[state.phase] if state.phase < len(phases) else None

    clock = RunClock(setting, phases, table, len(request.train), len(request.validation))

    with memory_explained(plan, running, config.evaluation_batch):
        data = training_data(request, setting.device, augmentation)
        clock.probe(setting, table, request.preprocess.size)
        seconds = clock.left(state, taught=False)
        if seconds is not None:
            reporter.note(f"{'what is left of the run' if state.history else 'the run'}: about {duration(seconds)}")
        try:
            run_phases(
                setting,
                data,
                state,
                request.out,
                reporter,
                before_learning=lambda: keep_base(request, setting, data, state, reporter.note),
                clock=clock,
            )
        except DivergedError as error:
            raise with_last_good(error, request, config, setting, state) from error
        return finish(request, config, setting, data, state, reporter)


def _doubts(request: TrainRequest, config: TrainConfig) -> list[str]:
    """What may be meant otherwise than it is, in a run that can go on all the same."""
    doubts = [] if request.initial is None else unnamed_classes(request.train, request.initial.class_names)
    if config.distillation_weight > 0 and not request.teachers and just_pruned(request):
        doubts.append("warning: the teacher is the pruned base itself; better: --teacher with the network it was")
    absent = sorted(set(range(request.network.num_classes)) - set(request.validation.labels.tolist()))
    if absent:
        names = ", ".join(repr(request.validation.class_names[label]) for label in absent[:10])
        doubts.append(f"warning: no validation image is of {len(absent)} of the classes ({names}): choices ignore them")
    return doubts


def _few_steps(request: TrainRequest, config: TrainConfig, phases: Sequence[Phase]) -> list[str]:
    """A warning of phases that see the data in so few steps an epoch that they learn little; nothing without any."""
    images = len(request.train)
    few, remedies = [], []
    for phase in phases:
        steps = steps_per_epoch(images, phase.batch, phase.share, config.whole_epochs)
        if phase.epochs == 0 or steps >= FEWEST_STEPS:
            continue
        few.append(f"{phase.name} {steps} (batch {phase.batch})")
        fitting = fitting_batch(int(images * phase.share), phase.batch)
        if fitting < phase.batch:
            remedies.append(f"--set {phase.settings or phase.name}.batch={fitting}")
    if not few:
        return []
    better = " ".join(remedies) or "more images, or more epochs"
    return [
        f"warning: fewer than {FEWEST_STEPS} steps an epoch teach little: {', '.join(few)}, from {images} images; "
        f"better: {better}"
    ]


def _standing(request: TrainRequest, setting: Setting, resumed: bool, reporter: Reporter) -> tuple[RunState, bool]:
    """Where the run stands, with its weights put in place, and whether its model is there.

    Says what it goes on from, and if in another precision.
    """
    precision = "bf16" if setting.bf16 else "fp32"
    # Asked of rank 0 alone: other machines need not have the folder.
    state, has_model = setting.world.once(lambda: (load_state(request.out), (request.out / MODEL_FILE).is_file()))
    if state is None:
        if has_model:
            raise TrainingError(
                f"{request.out}: holds a model, but not the {STATE_FILE} of the run that made it",
                remedy="move the model away to train it again, or choose another --out",
            )
        state = RunState()
    else:
        restore(state, setting)
        reporter.note(f"resuming {request.out}: {len(state.history)} epochs are done")
    if resumed and not state.history:
        reporter.note(f"resuming {request.out} from its start: its first epoch was not finished")
    before = state.precisions[-1:]
    if before != [precision] and not (before and state.finished):
        if before and state.history:
            reporter.note(f"note: the run was in {before[0]} so far, and goes on in {precision}")
        state.precisions.append(precision)
    return state, has_model
