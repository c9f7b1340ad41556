"""A whole training run: data and network in, ``RUN/model.safetensors`` out; resumes a run that was cut off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from bdexport import __version__
from bdexport.architecture import GateKind, GateSpec, PolicySpec, ResNetSpec, policy_spec
from bdexport.checkpoint import Checkpoint, build_model, save_checkpoint
from bdexport.config import TrainConfig
from bdexport.dataset import Dataset, check_classes
from bdexport.errors import BdexportError, TrainingError, UsageError
from bdexport.evaluate import fixed_strategy, keep_all, policy_statistics
from bdexport.hardware import machine
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.models.policy import PolicyNet
from bdexport.models.resnet import ResNet
from bdexport.preprocess import Preprocess
from bdexport.train.data import AUGMENTATION, Augmentation, DeviceImages, TrainingData
from bdexport.train.loop import Reporter, restore, run_phases, validation_outcome
from bdexport.train.phases import Setting
from bdexport.train.recalibrate import recalibrate_batch_norm
from bdexport.train.sequential import check_sequential
from bdexport.train.settings import check_ranges
from bdexport.train.state import (
    MODEL_FILE,
    RunState,
    Weights,
    agree_on_run,
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
    device: str = "auto"


def train(request: TrainRequest, config: TrainConfig, reporter: Reporter) -> Path:
    """Run every phase and write the chosen model; returns its path.

    Raises TrainingError (settings that differ from the run's, NaN loss, collapse, no memory), DatasetError.
    """
    config = _checked(request, config)
    device, device_reason = _device(request.device)
    bf16, bf16_reason = _precision(config, device)
    setting = _setting(request, config, device, bf16)
    resumed = agree_on_run(request.out, _description(request, config))
    reporter.note(f"device: {device} ({device_reason}); {'bf16' if bf16 else 'fp32'} ({bf16_reason})")
    state = load_state(request.out)
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
    data = _training_data(request, device)
    with _memory_errors(config):
        run_phases(setting, data, state, request.out, reporter)
        return _finish(request, config, setting, data, state, reporter)


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
    elif config.pretrain.epochs == 0:
        raise UsageError("no base network to start from", remedy="pass --base CKPT or --pretrain-epochs N")
    if config.policy.estimator == "leave_one_out" and config.policy.samples < 2:
        raise UsageError("leave_one_out", got=f"{config.policy.samples} sample", expected="--samples of at least 2")
    if config.method == "fixed":
        _check_fixed(request, config)
    if config.method == "sequential":
        check_sequential(config)
    target = config.policy.target_blocks
    if target is not None and not 0 < target <= request.network.num_blocks:
        raise UsageError("target blocks", got=target, expected=f"above 0, at most {request.network.num_blocks}")
    policy = config.policy
    for alpha in (policy.exploration_bound, policy.finetune_bound_start, policy.finetune_bound_end):
        if not 0.5 < alpha <= 1:
            raise UsageError("alpha", got=alpha, expected="above 0.5, at most 1")
    return config


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
    }


def _policy_spec(request: TrainRequest, config: TrainConfig) -> PolicySpec:
    """The policy of the checkpoint that training starts from, or the paper's, with its input pooled as configured."""
    if request.initial is not None and request.initial.policy is not None:
        return request.initial.policy
    spec = policy_spec(request.network)
    return spec if config.policy.input_pool is None else replace(spec, input_pool=config.policy.input_pool)


def _setting(request: TrainRequest, config: TrainConfig, device: str, bf16: bool) -> Setting:
    torch.manual_seed(config.seed)
    initial = request.initial
    model = BlockDropNet(request.network) if initial is None else build_model(initial, with_policy=False)
    if initial is None or initial.policy is None:
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
    elif request.initial is None or request.initial.gates != spec:
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


def _training_data(request: TrainRequest, device: str) -> TrainingData:
    def on_device(split: Dataset) -> DeviceImages:
        return DeviceImages(split.arrays(request.preprocess), split.labels, request.preprocess, device)

    augmentation = AUGMENTATION.get(request.train.name, Augmentation())
    return TrainingData(on_device(request.train), on_device(request.validation), augmentation)


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
    training: dict[str, Any] = {
        "bdexport": __version__,
        "complete": True,
        "base": request.base,
        "teachers": [name for name, _ in request.teachers],
        "dataset": {"name": request.train.name, "train": len(request.train), "validation": len(request.validation)},
        "settings": config.to_json(),
        "seconds": round(sum(row["seconds"] for row in state.history), 1),
        "machine": machine(),
        "torch": torch.__version__,
    }
    full = validation_outcome(setting, data.validation, keep_all(setting.num_blocks))
    training["validation"] = {"full_accuracy": full.accuracy}
    has_policy = config.method == "blockdrop" and not request.base_only
    if has_policy or model.gates is not None:
        training["validation"] |= _settle_batch_norm(config, setting, data, reporter)
        outcome = validation_outcome(setting, data.validation, None)
        figures = outcome.to_json(count_flops(model, request.preprocess.size), with_policy=has_policy)
        training["validation"] |= {
            "full_accuracy": validation_outcome(setting, data.validation, keep_all(setting.num_blocks)).accuracy,
            **({"policy": figures} if model.gates is None else {"gates": {"kind": config.method, **figures}}),
        }
        if config.method != "sact":  # its decisions are on positions; a mask would say little
            training["policy_statistics"] = policy_statistics(outcome, "validation")
    elif config.method == "fixed":
        training |= _fixed_result(request, config, setting, data)
    checkpoint = Checkpoint(
        network=request.network,
        policy=model.policy.spec if has_policy else None,
        preprocess=request.preprocess,
        class_names=request.train.class_names,
        state=_kept_weights(model, with_policy=has_policy),
        training=training,
        form="bdexport",
        gates=None if model.gates is None else model.gates.spec,
    )
    save_checkpoint(request.out / MODEL_FILE, checkpoint)
    state.finished = True
    save_state(request.out, state)
    return request.out / MODEL_FILE


def _fixed_result(request: TrainRequest, config: TrainConfig, setting: Setting, data: TrainingData) -> dict[str, Any]:
    assert setting.fixed_mask is not None
    title, strategy = fixed_strategy(setting.fixed_mask, config.fixed.kept, config.seed, setting.model)
    outcome = validation_outcome(setting, data.validation, strategy)
    flops = count_flops(setting.model, request.preprocess.size)
    return {
        "fixed_mask": {"mask": setting.fixed_mask, "kept": config.fixed.kept},
        "validation": {
            "full_accuracy": validation_outcome(setting, data.validation, keep_all(setting.num_blocks)).accuracy,
            "fixed": {title: outcome.to_json(flops, with_policy=False)},
        },
    }


def _kept_weights(model: BlockDropNet, with_policy: bool) -> Weights:
    """What a checkpoint stores: everything but batch norm's step counters, and the policy only if it was trained."""
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked") and (with_policy or not name.startswith("policy."))
    }


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


def _device(wanted: str) -> tuple[str, str]:
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


@contextmanager
def _memory_errors(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except BdexportError:
        raise
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "memory" not in text.lower():
            raise
        batch = max(config.finetune.batch, config.adapt.batch, config.curriculum.batch)
        raise TrainingError(
            f"out of memory at batch {batch} ({text.splitlines()[0] if text else 'MemoryError'})",
            remedy=f"try --batch {max(1, batch // 2)}",
        ) from error
