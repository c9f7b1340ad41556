"""The end of a run: the chosen model settled and saved, or the last good one of a run that went astray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdexport import __version__
from bdexport.checkpoint import Checkpoint, save_checkpoint
from bdexport.class_names import usable_names
from bdexport.config import TrainConfig
from bdexport.errors import DivergedError
from bdexport.evaluate import keep_all, policy_statistics
from bdexport.hardware import machine
from bdexport.json_text import finite
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.retarget import policy_logits, retarget, shift_for
from bdexport.train.advice import against_one_mask
from bdexport.train.choice import decision_trained, good_model
from bdexport.train.data import TrainingData, augmentation_for
from bdexport.train.loop import validation_outcome
from bdexport.train.phases import Setting
from bdexport.train.recalibrate import recalibrate_batch_norm
from bdexport.train.reporter import Reporter
from bdexport.train.request import TrainRequest, goes_on, learns_decisions
from bdexport.train.state import LAST_GOOD_FILE, MODEL_FILE, TEACHER_FILE, RunState, Weights, save_state
from bdexport.train.static_mask import best_static_mask


def finish(
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
    training = _record(request, config, setting, state, complete=True)
    if setting.world.size > 1:
        training["processes"] = setting.world.size
    decides = learns_decisions(request, config)
    if decides:
        if not goes_on(request, config) and not any(decision_trained(row) for row in state.history):
            reporter.note("warning: what decides about blocks was not trained: its masks are those of a random start")
        training |= _decided_result(request, config, setting, data, reporter)
    elif config.method == "fixed":
        training |= _fixed_result(request, config, setting, data)
    full = validation_outcome(setting, data.validation, keep_all(setting.num_blocks))
    training["validation"] = {"full_accuracy": full.accuracy} | training.get("validation", {})
    checkpoint = _checkpoint(request, model, model.state_dict(), training, decides)
    if checkpoint.class_names != request.train.class_names:
        reporter.note("warning: some class names cannot be stored as they are: '?' stands for what cannot")

    def write() -> None:
        save_checkpoint(request.out / MODEL_FILE, checkpoint)
        (request.out / LAST_GOOD_FILE).unlink(missing_ok=True)  # of a run that went on with another batch after all
        (request.out / TEACHER_FILE).unlink(missing_ok=True)
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
    used = float(outcome.blocks_used.mean())
    if used in (0.0, float(setting.num_blocks)) and config.method in ("blockdrop", "sequential"):
        reporter.note(f"warning: the policy {'keeps' if used else 'drops'} every block for every image")
    elif outcome.unique_masks == 1 and config.method in ("blockdrop", "sequential"):
        reporter.note(f"warning: {against_one_mask(config)}")
    figures = outcome.to_json(count_flops(setting.model, request.preprocess.size), with_policy=gates is None)
    decided = {"policy": figures} if gates is None else {"gates": {"kind": gates.spec.kind, **figures}}
    result["validation"] = settled | decided
    if gates is None:
        static = best_static_mask(setting, data, outcome, count_flops(setting.model, request.preprocess.size), reporter)
        result["validation"] |= {} if static is None else {"static": static}
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
    shift = shift_for(logits, target)
    reached = float((logits + np.float32(shift) >= 0).sum(axis=1).mean())
    if reached == 0:
        reporter.note(
            f"warning: no shift of the policy's logits keeps any block within {target:g} on average: they are left as "
            "they are; raise --target-blocks, or learn for more epochs"
        )
        return 0.0
    retarget(setting.model, logits, target)
    reporter.note(f"policy logits shifted by {shift:+.3f}: {reached:.2f} blocks on average on the validation split")
    return shift


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
    sound = all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())  # or it could not be saved
    kept = sound and accuracy_after >= accuracy_before
    if not kept:
        model.load_state_dict(before)
    verdict = "kept" if kept else f"not kept: {'the accuracy fell' if sound else 'they are not finite'}"
    reporter.note(
        f"batch-norm statistics re-estimated on greedy paths: validation accuracy {accuracy_before:.2f} % -> "
        f"{accuracy_after:.2f} %, {verdict}"
    )
    return {"recalibrated": kept}


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


def with_last_good(
    error: DivergedError, request: TrainRequest, config: TrainConfig, setting: Setting, state: RunState
) -> DivergedError:
    """Write the best model before the run went astray, for what it is worth; the error that says where it is."""
    best = good_model(state, setting.num_blocks)
    if best is None:
        kept = "no model before it is worth keeping"
    else:
        training = _record(request, config, setting, state, complete=False) | {
            "stopped": error.what,
            "epoch": best.figures,
        }
        if setting.fixed_mask is not None:
            training |= _fixed_mask(config, setting)
        # What came with the base was trained before.
        decides = best.has_policy or (learns_decisions(request, config) and goes_on(request, config))
        checkpoint = _checkpoint(request, setting.model, best.weights, training, decides)
        path = request.out / LAST_GOOD_FILE
        setting.world.once(lambda: save_checkpoint(path, checkpoint))
        kept = f"the last good model ({best.figures['phase']} {best.figures['epoch']}) is {path}"
    return DivergedError(f"{error.what}; {kept}", remedy=error.remedy)


def _record(
    request: TrainRequest, config: TrainConfig, setting: Setting, state: RunState, complete: bool
) -> dict[str, Any]:
    """The training result, but for what it reached."""
    return {
        "bdexport": __version__,
        "complete": complete,
        "base": request.base,
        "base_sha256": request.base_sha256,
        "base_measured": state.base,
        "fresh_policy": request.fresh_policy,
        "teachers": [name for name, _ in request.teachers],
        "teachers_sha256": list(request.teachers_sha256),
        "dataset": {
            "name": request.train.name,
            "train": len(request.train),
            "validation": len(request.validation),
            "skipped": len(request.train.skipped) + len(request.validation.skipped),  # damaged, as --skip-damaged asks
            **({} if request.limit is None else {"limit": request.limit}),
        },
        "settings": config.to_json(),
        "augmentation": asdict(augmentation_for(request.train.name, config.augment)),
        "seconds": round(sum(row["seconds"] for row in state.history), 1),
        "machine": machine(),
        "device": torch.cuda.get_device_name(setting.device) if setting.device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "precision": " and ".join(dict.fromkeys(state.precisions)),
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
        class_names=usable_names(request.train.class_names),
        state=kept,
        training=finite(training),
        form="bdexport",
        notes=() if request.initial is None else request.initial.notes,
    )
