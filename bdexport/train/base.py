"""How good the base is before anything is learned on it: what every later accuracy is held against."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch

from bdexport.checkpoint import Checkpoint, build_model, save_checkpoint
from bdexport.class_names import usable_names
from bdexport.evaluate import keep_all
from bdexport.files import sha256_file
from bdexport.models.pair import BlockDropNet
from bdexport.train.data import TrainingData
from bdexport.train.loop import validation_outcome
from bdexport.train.phases import Setting
from bdexport.train.request import TrainRequest
from bdexport.train.state import BASE_FILE, RunState, weights_of


def keep_base(
    request: TrainRequest, setting: Setting, data: TrainingData, state: RunState, note: Callable[[str], None]
) -> None:
    """Measure the base on the validation split, every block kept, and write it to ``RUN/base.safetensors``; once.

    The base is the network as it came, or as pretraining left it. In a run of an older version, which has learned on
    it already, only the former is still known.
    """
    if state.base is not None or request.base_only:
        return
    begun = any(row["phase"] != "pretrain" for row in state.history)
    if begun and request.initial is None:
        return
    model = _initial(request, setting) if begun and request.initial is not None else setting.model
    asked = copy(setting)
    asked.model = model
    outcome = validation_outcome(asked, data.validation, keep_all(setting.num_blocks))
    digest = setting.world.once(lambda: _written(request, model))
    state.base = {
        "dataset": request.validation.name,
        "split": "validation",
        "images": len(outcome.correct),
        "accuracy": outcome.accuracy,
        "file_sha256": digest,
    }
    text = f"the base, every block kept: {outcome.accuracy:.2f} % of {len(outcome.correct)} validation images"
    if request.initial is not None:  # public CIFAR checkpoints were trained on the whole training set
        text += ", which it may have been trained on; 'bdexport evaluate RUN' compares on test images"
    note(text)


def _initial(request: TrainRequest, setting: Setting) -> BlockDropNet:
    assert request.initial is not None
    with torch.random.fork_rng(devices=[]):  # a policy is drawn along with it
        model = build_model(request.initial, with_policy=False)
    return model.to(device=setting.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _written(request: TrainRequest, model: BlockDropNet) -> str:
    """Write the network alone, as a checkpoint that every command takes; returns the file's SHA-256."""
    path = request.out / BASE_FILE
    state = {
        name: tensor
        for name, tensor in weights_of(model).items()
        if name.startswith("network.") and not name.endswith("num_batches_tracked")
    }
    names = usable_names(request.train.class_names)
    save_checkpoint(path, Checkpoint(request.network, None, request.preprocess, names, state))
    return sha256_file(path)
