"""A whole training run: data and network in, ``RUN/model.safetensors`` out; resumes a run that was cut off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from bdexport import __version__
from bdexport.architecture import GateKind, GateSpec, PolicySpec, ResNetSpec, policy_spec
from bdexport.checkpoint import Checkpoint, build_model, save_checkpoint
from bdexport.config import PolicyConfig, TrainConfig
from bdexport.dataset import Dataset, check_classes
from bdexport.dataset.base import Pixels, all_of
from bdexport.errors import DivergedError, ImageError, TrainingError, UsageError
from bdexport.evaluate import fixed_strategy, keep_all, policy_statistics
from bdexport.hardware import machine
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.models.policy import PolicyNet
from bdexport.models.resnet import ResNet
from bdexport.preprocess import Preprocess
from bdexport.retarget import policy_logits, retarget
from bdexport.train.advice import against_one_mask
from bdexport.train.data import AUGMENTATION, Augmentation, DeviceImages, TrainingData
from bdexport.train.distributed import ALONE, World, check_batches
from bdexport.train.loop import Reporter, good_model, restore, run_phases, validation_outcome
from bdexport.train.memory import check_memory, memory_explained, memory_plan
from bdexport.train.methods import phases_of
from bdexport.train.phases import Phase, Setting, levels_from_text
from bdexport.train.recalibrate import recalibrate_batch_norm
from bdexport.train.sequential import check_sequential
from bdexport.train.settings import check_ranges, per_stage
from bdexport.train.state import (
    LAST_GOOD_FILE,
    MODEL_FILE,
    RunState,
    Weights,
    agree_on_run,
    differences,
    generator_for,
    load_state,
    save_state,
)


@dataclass(frozen=True)
class TrainRequest:
    """What to train on what. ``initial`` holds the base's weights (and its policy, if it has one), or is None."""

    network: ResNetSpec
    preprocess: Preprocess
    train: Dataset
    validation: Dataset
    out: Path
    initial: Checkpoint | None = None
    base: str | None = None  # what to call the base in the record
    teachers: tuple[tuple[str, Checkpoint], ...] = ()  # names and networks to distil from; none: the base
    base_only: bool = False
    fresh_policy: bool = False  # leave the base's policy aside and learn a new one
    device: str = "auto"


def train(request: TrainRequest, config: TrainConfig, reporter: Reporter, world: World = ALONE) -> Path:
    """Run every phase and write the chosen model; returns its path.

    Of several processes each calls this with its ``world`` (:func:`bdexport.train.distributed.joined`).
    Raises TrainingError (settings that differ from the run's, NaN loss, collapse, no memory), DatasetError.
    """
    config = _checked(request, config)
    device, device_reason = _device(request.device, world)
    bf16, bf16_reason = _precision(config, device)
    setting = _setting(request, config, device, bf16)
    setting.world = world
    with torch.random.fork_rng(devices=[]):  # asked for their batches only; those that learn draw their own weights
        phases = [phase(setting) for phase in phases_of(config)]
    check_batches({f"{phase.name}.batch": phase.batch for phase in phases if phase.epochs}, world)
    resumed = _agree(request, config, world)
    reporter.note(f"device: {device} ({device_reason}); {'bf16' if bf16 else 'fp32'} ({bf16_reason})")
    if world.size > 1:
        reporter.note(f"{world.size} processes, each with its shard of every batch")
    state = world.once(lambda: load_state(request.out))
    if state is None:
        state = RunState()
    else:
        restore(state, setting)
        reporter.note(f"resuming {request.out}: {len(state.history)} epochs are done")
    if state.finished and (request.out / MODEL_FILE).is_file():
        reporter.note(f"{request.out} is complete already")
        return request.out / MODEL_FILE
    if resumed and not state.history:
        reporter.note(f"resuming {request.out} from its start: its first epoch was not finished")
    if config.distillation_weight > 0 and not request.teachers and _just_pruned(request):
        reporter.note("warning: the teacher is the pruned base itself; better: --teacher with the network it was")
    plan = memory_plan(setting, request.preprocess.size, _bytes_to_load(request, device))
    check_memory(plan, phases[state.phase :], reporter.note)

    def running() -> Phase | None:
        return phases[state.phase] if state.phase < len(phases) else None

    with memory_explained(plan, running, config.evaluation_batch):
        data = _training_data(request, device)
        try:
            run_phases(setting, data, state, request.out, reporter)
        except DivergedError as error:
            raise _with_last_good(error, request, config, setting, state) from error
        return _finish(request, config, setting, data, state, reporter)


def _just_pruned(request: TrainRequest) -> bool:
    """A base that has lost filters and has not been finetuned since."""
    return request.initial is not None and "pruned" in request.initial.training


def _checked(request: TrainRequest, config: TrainConfig) -> TrainConfig:
    """Settle phases that the request rules out, and refuse what cannot work."""
    check_ranges(config)
    if request.base_only and request.initial is not None:
        raise UsageError("--base-only with --base: nothing to train", remedy="leave one of them out")
    for split in (request.train, request.validation):
        check_classes(split, request.network.num_classes, split.class_names)
    if request.base_only:
        config = replace(
            config,
            method="blockdrop",
            prime=replace(config.prime, epochs=0),
            adapt=replace(config.adapt, epochs=0),
            curriculum=replace(config.curriculum, epochs=0),
            finetune=replace(config.finetune, epochs=0),
        )
    if request.initial is not None:
        config = replace(config, pretrain=replace(config.pretrain, epochs=0))
        if _goes_on(request, config):  # with what decides, from where it is; these are for a fresh one
            config = replace(
                config, prime=replace(config.prime, epochs=0), policy=replace(config.policy, order_images=0)
            )
    elif config.pretrain.epochs == 0:
        raise UsageError("no base network to start from", remedy="pass --base CKPT or --pretrain-epochs N")
    levels_from_text(config.adapt.levels, request.network.num_blocks)
    if config.method == "fixed":
        _check_fixed(request, config)
    if config.method == "sequential":
        check_sequential(config)
    if config.method in ("act", "sact") and max(request.network.stages) < 2:
        raise UsageError(
            f"method {config.method}",
            got=f"one block a stage ({request.network.name})",
            expected="a stage of two blocks or more: a stage halts after its first",
        )
    _check_policy(config.policy, request.network.num_blocks)
    if config.method == "blockdrop" and config.policy.estimator == "marginal" and not request.base_only:
        _check_marginal(config)
    return config


def _check_policy(policy: PolicyConfig, num_blocks: int) -> None:
    if policy.estimator == "leave_one_out" and policy.samples < 2:
        raise UsageError("leave_one_out", got=f"{policy.samples} sample", expected="--samples of at least 2")
    if policy.estimator == "gumbel" and policy.reward != "probability":
        got = f"reward {policy.reward}, which has no gradient"
        raise UsageError("estimator gumbel", got=got, expected="--reward probability")
    target = policy.target_blocks
    if target is not None and not 0 < target <= num_blocks:
        raise UsageError("target blocks", got=target, expected=f"above 0, at most {num_blocks}")
    for alpha in (policy.exploration_bound, policy.finetune_bound_start, policy.finetune_bound_end):
        if not 0.5 < alpha <= 1:
            raise UsageError("alpha", got=alpha, expected="above 0.5, at most 1")


def _check_marginal(config: TrainConfig) -> None:
    if not config.adapt.levels:
        raise UsageError("estimator marginal", got="no levels", expected="--set adapt.levels=15,10,7,5 or the like")
    if config.policy.target_blocks is None:
        raise UsageError("estimator marginal", got="no block budget", expected="--target-blocks")


def _check_fixed(request: TrainRequest, config: TrainConfig) -> None:
    mask, kept, num_blocks = config.fixed.mask, config.fixed.kept, request.network.num_blocks
    if mask == "search":
        if kept is None or not 1 <= kept <= num_blocks:
            raise UsageError("fixed.kept", got=kept, expected=f"1 to {num_blocks} blocks", remedy="pass --kept K")
        return
    fixed_strategy(mask, kept, 0, BlockDropNet(request.network))


def _description(request: TrainRequest, config: TrainConfig) -> dict[str, Any]:
    """What a resumed run must agree with."""
    return {
        "schema": "bdexport.run/1",
        "settings": config.to_json(),
        "network": request.network.to_json(),
        "policy": _policy_spec(request, config).to_json(),
        "gates": None if (gates := _gate_spec(config)) is None else gates.to_json(),
        "preprocess": request.preprocess.to_json(),
        "dataset": {"name": request.train.name, "train": len(request.train), "validation": len(request.validation)},
        "base": request.base,
        "teachers": [name for name, _ in request.teachers],
        "base_only": request.base_only,
        "fresh_policy": request.fresh_policy,
    }


def _kept_policy(request: TrainRequest) -> PolicySpec | None:
    """The base's policy, where training goes on with it."""
    return None if request.initial is None or request.fresh_policy else request.initial.policy


def _kept_gates(request: TrainRequest, config: TrainConfig) -> GateSpec | None:
    """The base's gates, where the method trains such ones and goes on with them."""
    spec = _gate_spec(config)
    if request.initial is None or request.fresh_policy or request.initial.gates != spec:
        return None
    return spec


def _goes_on(request: TrainRequest, config: TrainConfig) -> bool:
    """Whether what the method lets decide comes with the base."""
    kept = _kept_policy(request) if _gate_spec(config) is None else _kept_gates(request, config)
    return kept is not None


def _decides(request: TrainRequest, config: TrainConfig) -> bool:
    """Whether what the run makes decides about blocks, by a policy or by gates."""
    return config.method != "fixed" and not request.base_only


def _policy_spec(request: TrainRequest, config: TrainConfig) -> PolicySpec:
    """The policy of the checkpoint that training starts from, or the paper's, with its input pooled as configured."""
    kept = _kept_policy(request)
    if kept is not None:
        return kept
    wanted = config.policy
    spec = replace(policy_spec(request.network), hidden=wanted.hidden, stem_stride=wanted.stem_stride)
    if wanted.stages:
        spec = replace(spec, stages=per_stage("policy.stages", wanted.stages, len(spec.stages)))
    if wanted.widths:
        spec = replace(spec, widths=per_stage("policy.widths", wanted.widths, len(spec.stages)))
    return spec if wanted.input_pool is None else replace(spec, input_pool=wanted.input_pool)


def _setting(request: TrainRequest, config: TrainConfig, device: str, bf16: bool) -> Setting:
    torch.manual_seed(config.seed)
    initial = request.initial
    model = BlockDropNet(request.network) if initial is None else build_model(initial, with_policy=False)
    if _kept_policy(request) is None:
        model.policy = PolicyNet(_policy_spec(request, config))
        with torch.no_grad():
            model.policy.fc.bias.fill_(config.policy.initial_keep_logit)
    _settle_gates(model, request, config)
    _check_size(model, request.preprocess)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teachers = [_teacher(name, found, request, device) for name, found in request.teachers]
    return Setting(model, teachers, None, config, device, bf16, generator_for(config.seed, 0, 0, device))


def _settle_gates(model: BlockDropNet, request: TrainRequest, config: TrainConfig) -> None:
    """The gates that the method trains: those of the base if it has such ones, or fresh ones; none for most methods."""
    spec = _gate_spec(config)
    if spec is None:
        model.gates = None
    elif _kept_gates(request, config) is None:
        sequential = spec.kind == "sequential"
        model.set_gates(spec).start_from(
            config.policy.initial_keep_logit if sequential else config.halting.initial_logit
        )


def _gate_spec(config: TrainConfig) -> GateSpec | None:
    if config.method not in get_args(GateKind):
        return None
    return GateSpec(cast(GateKind, config.method), None if config.method == "sequential" else config.halting.margin)


def _teacher(name: str, found: Checkpoint, request: TrainRequest, device: str) -> ResNet:
    """A network to distil from, frozen. It must know the same classes and read the same preprocessed images."""
    if found.network.num_classes != request.network.num_classes:
        raise UsageError(
            f"teacher {name}", got=f"{found.network.num_classes} classes", expected=request.network.num_classes
        )
    if found.preprocess != request.preprocess:
        raise UsageError(
            f"teacher {name}: another preprocessing than the base's",
            got=found.preprocess.to_json(),
            expected=request.preprocess.to_json(),
        )
    network = build_model(found, with_policy=False).network.requires_grad_(False)
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _check_size(model: BlockDropNet, preprocess: Preprocess) -> None:
    """Both networks halve the image, the policy after pooling it; not every size can be divided like that."""
    try:
        count_flops(model, preprocess.size)
    except RuntimeError as error:
        height, width = preprocess.size
        raise UsageError(
            f"images of {height}x{width} pixels cannot be halved as often as the networks halve them",
            got=f"a policy that pools its input by {model.policy.spec.input_pool} first",
            remedy="choose another pooling, e.g. --set policy.input_pool=1",
        ) from error


def _agree(request: TrainRequest, config: TrainConfig, world: World) -> bool:
    """Whether the run existed; every process must have been given the same one."""
    own = _description(request, config)
    leader, *others = world.everyones(own)
    for rank, other in enumerate(others, 1):
        found = differences(leader, other)
        if found:
            raise TrainingError(
                f"rank {rank} was given another run than rank 0",
                got="; ".join(found.values()),
                remedy="start every process with the same settings and data",
            )
    return world.once(lambda: agree_on_run(request.out, own))


def _bytes_to_load(request: TrainRequest, device: str) -> int:
    """What the images will take beside what they take already."""
    height, width = request.preprocess.size
    splits = (request.train, request.validation)
    return sum(
        3 * height * width * len(split)
        for split in splits
        if device != "cpu" or not isinstance(split.source, np.ndarray)
    )


def _training_data(request: TrainRequest, device: str) -> TrainingData:
    errors: list[ImageError] = []

    def fitted(split: Dataset) -> Pixels:
        try:
            return split.arrays(request.preprocess)
        except ImageError as error:  # whoever mends the data wants to know of the other split's damage too
            errors.append(error)
            return np.empty((0, *request.preprocess.size, 3), np.uint8)

    splits = [(split, fitted(split)) for split in (request.train, request.validation)]
    if errors:
        raise all_of(errors)
    train, validation = (DeviceImages(pixels, split.labels, request.preprocess, device) for split, pixels in splits)
    return TrainingData(train, validation, AUGMENTATION.get(request.train.name, Augmentation()))


def _finish(
    request: TrainRequest,
    config: TrainConfig,
    setting: Setting,
    data: TrainingData,
    state: RunState,
    reporter: Reporter,
) -> Path:
    """Take the best model, re-estimate batch norm where that helps on the validation split, and save."""
    model = setting.model
    if state.best is not None:
        model.load_state_dict(state.best.weights)
    training = _record(request, config, state, complete=True)
    if setting.world.size > 1:
        training["processes"] = setting.world.size
    decides = _decides(request, config)
    if decides:
        training |= _decided_result(request, config, setting, data, reporter)
    elif config.method == "fixed":
        training |= _fixed_result(request, config, setting, data)
    full = validation_outcome(setting, data.validation, keep_all(setting.num_blocks))
    training["validation"] = {"full_accuracy": full.accuracy} | training.get("validation", {})
    checkpoint = _checkpoint(request, model, model.state_dict(), training, decides)

    def write() -> None:
        save_checkpoint(request.out / MODEL_FILE, checkpoint)
        (request.out / LAST_GOOD_FILE).unlink(missing_ok=True)  # of a run that went on with another batch after all
        state.finished = True
        save_state(request.out, state)

    setting.world.once(write)
    return request.out / MODEL_FILE


def _decided_result(
    request: TrainRequest, config: TrainConfig, setting: Setting, data: TrainingData, reporter: Reporter
) -> dict[str, Any]:
    """Settle the policy's budget and the batch norms; what the model then does on the validation split."""
    gates = setting.model.gates
    result: dict[str, Any] = {}
    if gates is None:
        result["logit_shift"] = _settle_budget(config, setting, data, reporter)
    settled = _settle_batch_norm(config, setting, data, reporter)
    outcome = validation_outcome(setting, data.validation, None)
    if outcome.unique_masks == 1 and config.method in ("blockdrop", "sequential"):
        reporter.note(f"warning: {against_one_mask(config)}")
    figures = outcome.to_json(count_flops(setting.model, request.preprocess.size), with_policy=gates is None)
    decided = {"policy": figures} if gates is None else {"gates": {"kind": gates.spec.kind, **figures}}
    result["validation"] = settled | decided
    if config.method != "sact":  # its decisions are on positions; a mask would say little
        result["policy_statistics"] = policy_statistics(outcome, "validation")
    return result


def _settle_budget(config: TrainConfig, setting: Setting, data: TrainingData, reporter: Reporter) -> float:
    """Shift the policy's logits so that the validation split meets the budget, if there is one; returns the shift."""
    target = config.policy.target_blocks
    if target is None or not config.retarget:
        return 0.0
    setting.model.eval()
    logits = policy_logits(setting.model, data.validation.batches(config.evaluation_batch))
    shift = retarget(setting.model, logits, target)
    reporter.note(f"policy logits shifted by {shift:+.3f}: {target:g} blocks on average on the validation split")
    return shift


def _fixed_result(request: TrainRequest, config: TrainConfig, setting: Setting, data: TrainingData) -> dict[str, Any]:
    title, strategy = setting.fixed_strategy()
    outcome = validation_outcome(setting, data.validation, strategy)
    flops = count_flops(setting.model, request.preprocess.size)
    return _fixed_mask(config, setting) | {
        "validation": {
            "full_accuracy": validation_outcome(setting, data.validation, keep_all(setting.num_blocks)).accuracy,
            "fixed": {title: outcome.to_json(flops, with_policy=False)},
        },
    }


def _fixed_mask(config: TrainConfig, setting: Setting) -> dict[str, Any]:
    """What ``evaluate`` and ``report`` take as the mask that the network is for."""
    return {"fixed_mask": {"mask": setting.fixed_mask, "kept": config.fixed.kept}}


def _record(request: TrainRequest, config: TrainConfig, state: RunState, complete: bool) -> dict[str, Any]:
    """The training result, but for what it reached."""
    return {
        "bdexport": __version__,
        "complete": complete,
        "base": request.base,
        "teachers": [name for name, _ in request.teachers],
        "dataset": {"name": request.train.name, "train": len(request.train), "validation": len(request.validation)},
        "settings": config.to_json(),
        "seconds": round(sum(row["seconds"] for row in state.history), 1),
        "machine": machine(),
        "torch": torch.__version__,
    }


def _checkpoint(
    request: TrainRequest, model: BlockDropNet, weights: Weights, training: dict[str, Any], decides: bool
) -> Checkpoint:
    """Everything but batch norm's step counters, and policy or gates only if they were trained (``decides``)."""
    with_policy, with_gates = decides and model.gates is None, decides and model.gates is not None
    left_out = [group for group, kept in (("policy.", with_policy), ("gates.", with_gates)) if not kept]
    kept = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in weights.items()
        if not name.endswith("num_batches_tracked") and not name.startswith(tuple(left_out))
    }
    return Checkpoint(
        network=request.network,
        policy=model.policy.spec if with_policy else None,
        gates=model.gates.spec if decides and model.gates is not None else None,
        preprocess=request.preprocess,
        class_names=request.train.class_names,
        state=kept,
        training=training,
        form="bdexport",
    )


def _with_last_good(
    error: DivergedError, request: TrainRequest, config: TrainConfig, setting: Setting, state: RunState
) -> DivergedError:
    """Write the best model before the run went astray, for what it is worth; the error that says where it is."""
    best = good_model(state, setting.num_blocks)
    if best is None:
        kept = "no model before it is worth keeping"
    else:
        training = _record(request, config, state, complete=False) | {"stopped": error.what, "epoch": best.figures}
        if setting.fixed_mask is not None:
            training |= _fixed_mask(config, setting)
        # What came with the base was trained before.
        decides = best.has_policy or (_decides(request, config) and _goes_on(request, config))
        checkpoint = _checkpoint(request, setting.model, best.weights, training, decides)
        path = request.out / LAST_GOOD_FILE
        setting.world.once(lambda: save_checkpoint(path, checkpoint))
        kept = f"the last good model ({best.figures['phase']} {best.figures['epoch']}) is {path}"
    return DivergedError(f"{error.what}; {kept}", remedy=error.remedy)


def _settle_batch_norm(config: TrainConfig, setting: Setting, data: TrainingData, reporter: Reporter) -> dict[str, Any]:
    """Re-estimate the statistics on greedy paths; keep them if the validation accuracy is not lower."""
    if config.recalibrate_images == 0:
        return {"recalibrated": False}
    model = setting.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accuracy_before = validation_outcome(setting, data.validation, None).accuracy
    with setting.autocast():
        recalibrate_batch_norm(model, data.train.batches(config.evaluation_batch, config.recalibrate_images))
    accuracy_after = validation_outcome(setting, data.validation, None).accuracy
    kept = accuracy_after >= accuracy_before
    if not kept:
        model.load_state_dict(before)
    verdict = "kept" if kept else "not kept: the accuracy fell"
    reporter.note(
        f"batch-norm statistics re-estimated on greedy paths: validation accuracy {accuracy_before:.2f} % -> "
        f"{accuracy_after:.2f} %, {verdict}"
    )
    return {"recalibrated": kept}


def _device(wanted: str, world: World) -> tuple[str, str]:
    if world.size > 1 and wanted in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{world.local_rank}", "one CUDA device for each process"
    if wanted == "auto":
        return ("cuda", "a CUDA device is present") if torch.cuda.is_available() else ("cpu", "no CUDA device")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("device", got=wanted, expected="a CUDA device that torch can use", remedy="use --device cpu")
    if wanted != "cpu" and not wanted.startswith("cuda"):
        raise UsageError("device", got=wanted, expected="auto, cpu or cuda")
    return wanted, "asked for"


def _precision(config: TrainConfig, device: str) -> tuple[bool, str]:
    if config.precision != "auto":
        return config.precision == "bf16", "asked for"
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported()
        return fast, "the GPU has bf16 units" if fast else "the GPU has no bf16 units"
    capability = torch.backends.cpu.get_cpu_capability()
    fast = any("bf16" in extension for extension in machine()["isa"])
    return fast, f"the CPU has {'' if fast else 'no '}bf16 units, {capability}"
