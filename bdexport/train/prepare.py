"""From a request to what the phases work on: device, precision, model, teachers, images."""

from __future__ import annotations

import numpy as np
import torch

from bdexport.checkpoint import Checkpoint, build_model
from bdexport.config import AugmentConfig, TrainConfig
from bdexport.dataset import Dataset, check_classes
from bdexport.dataset.base import Pixels, all_of
from bdexport.errors import DatasetError, ImageError, UsageError
from bdexport.hardware import machine
from bdexport.models.pair import BlockDropNet
from bdexport.models.policy import PolicyNet
from bdexport.models.resnet import ResNet
from bdexport.train.checks import check_size
from bdexport.train.data import Augmentation, DeviceImages, TrainingData, augmentation_for
from bdexport.train.distributed import World
from bdexport.train.phases import Setting
from bdexport.train.request import TrainRequest, kept_gates, kept_policy, wanted_gates, wanted_policy
from bdexport.train.state import generator_for


def chosen_device(wanted: str, world: World) -> tuple[str, str]:
    """The device and why; UsageError on one that is unknown or not there."""
    if world.size > 1 and wanted in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{world.local_rank}", "one CUDA device for each process"
    if world.size > 1 and wanted.startswith("cuda:"):
        raise UsageError(
            "device", got=f"{wanted} for {world.size} processes", expected="a GPU for each", remedy="use --device cuda"
        )
    if wanted == "auto":
        return ("cuda", "a CUDA device is present") if torch.cuda.is_available() else ("cpu", "no CUDA device")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("device", got=wanted, expected="a CUDA device that torch can use", remedy="use --device cpu")
    if wanted != "cpu" and not wanted.startswith("cuda"):
        raise UsageError("device", got=wanted, expected="auto, cpu or cuda")
    return wanted, "asked for"


def chosen_precision(config: TrainConfig, device: str) -> tuple[bool, str]:
    """Whether to use bf16 and why."""
    if config.precision != "auto":
        return config.precision == "bf16", "asked for"
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported()
        return fast, "the GPU has bf16 units" if fast else "the GPU has no bf16 units"
    capability = torch.backends.cpu.get_cpu_capability()
    fast = any("bf16" in extension for extension in machine()["isa"])
    return fast, f"the CPU has {'' if fast else 'no '}bf16 units, {capability}"


def new_setting(request: TrainRequest, config: TrainConfig, device: str, bf16: bool) -> Setting:
    """Model and teachers on the device, fresh parts drawn from the seed; UsageError on what does not fit the base."""
    torch.manual_seed(config.seed)
    initial = request.initial
    model = BlockDropNet(request.network) if initial is None else build_model(initial, with_policy=False)
    if kept_policy(request) is None:
        model.policy = PolicyNet(wanted_policy(request, config))
        with torch.no_grad():
            model.policy.fc.bias.fill_(config.policy.initial_keep_logit)
    _settle_gates(model, request, config)
    check_size(model, request.preprocess)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teachers = [_teacher(name, found, request, device) for name, found in request.teachers]
    return Setting(model, teachers, None, config, device, bf16, generator_for(config.seed, 0, 0, device))


def _settle_gates(model: BlockDropNet, request: TrainRequest, config: TrainConfig) -> None:
    """The gates that the method trains: those of the base if it has such ones, or fresh ones; none for most methods."""
    spec = wanted_gates(config)
    if spec is None:
        model.gates = None
    elif kept_gates(request, config) is None:
        sequential = spec.kind == "sequential"
        model.set_gates(spec).start_from(
            config.policy.initial_keep_logit if sequential else config.halting.initial_logit
        )


def _teacher(name: str, found: Checkpoint, request: TrainRequest, device: str) -> ResNet:
    """A network to distil from, frozen. It must know the same classes and read the same preprocessed images."""
    if found.network.num_classes != request.network.num_classes:
        raise UsageError(
            f"teacher {name}",
            got=f"{found.network.num_classes} classes",
            expected=request.network.num_classes,
            remedy="name a network for the same data",
        )
    try:
        check_classes(request.train, request.network.num_classes, found.class_names)
    except DatasetError as error:
        raise UsageError(
            f"teacher {name}: {error.what}", got=error.got, expected=error.expected, remedy=error.remedy
        ) from error
    if found.preprocess != request.preprocess:
        raise UsageError(
            f"teacher {name}: another preprocessing than the base's",
            got=found.preprocess.to_json(),
            expected=request.preprocess.to_json(),
        )
    network = build_model(found, with_policy=False).network.requires_grad_(False)
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def bytes_to_load(request: TrainRequest, device: str) -> int:
    """What the images will take beside what they take already."""
    height, width = request.preprocess.size
    splits = (request.train, request.validation)
    return sum(
        3 * height * width * len(split)
        for split in splits
        if device != "cpu" or not isinstance(split.source, np.ndarray)
    )


def training_data(request: TrainRequest, device: str, augmentation: Augmentation | None = None) -> TrainingData:
    """Both splits on the device, to be augmented as given (None: as suits the data set).

    One ImageError names what is damaged in either split.
    """
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
    return TrainingData(train, validation, augmentation or augmentation_for(request.train.name, AugmentConfig()))
