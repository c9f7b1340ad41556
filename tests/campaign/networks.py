"""Networks, bundles and images that several kinds share."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from bundles import pixels
from numpy.typing import NDArray
from tiny import SIZE, tiny_checkpoint, tiny_model

from bdexport.backends import get_backend
from bdexport.build import BuiltBundle, bundle_from_model
from bdexport.config import BuildConfig, FusedConfig
from bdexport.dataset import Dataset
from bdexport.models.pair import BlockDropNet
from bdexport.parts import Masks
from bdexport.preprocess import Preprocess


def backends() -> tuple[str, ...]:
    """The backends that run on this machine without a GPU."""
    return tuple(name for name in ("onnxruntime", "openvino", "torch") if find_spec(name) is not None)


def build(
    folder: Path, model: BlockDropNet, backend: str, paths: int | None = None, size: tuple[int, int] = SIZE
) -> BuiltBundle:
    """A bundle of ``model`` for images of ``size``; ``paths``: how many masks get an engine of their own."""
    torch.set_num_threads(1)
    fused = FusedConfig(measure=False) if paths is None else replace(FusedConfig(measure=False), paths=paths)
    names = tuple(f"class {index}" for index in range(model.network.spec.num_classes))
    counted = None if paths is None else images_to_count(names)
    return bundle_from_model(
        model,
        replace(tiny_checkpoint(model), class_names=names, preprocess=Preprocess(size=size)),
        folder,
        get_backend(backend),
        config=BuildConfig(backend=backend, fused=fused),
        checkpoint_sha256="0" * 64,
        counted=counted,
    )


def images_to_count(class_names: tuple[str, ...], count: int = 40) -> Dataset:
    """Random images, on which masks are counted."""
    labels = np.arange(count, dtype=np.int64) % len(class_names)
    return Dataset("folder", "validation", class_names, labels, pixels(count))


def model_of(seed: int, classes: int = 3, **shape: Any) -> BlockDropNet:
    """A small network with weights drawn from ``seed``."""
    return tiny_model(seed=seed, classes=classes, **shape)


def random_masks(random: Random, count: int, num_blocks: int) -> Masks:
    """Masks (count, K); kept blocks are rare, even, or frequent, each for a third of the images."""
    generator = np.random.default_rng(random.getrandbits(32))
    share = generator.choice([0.15, 0.5, 0.85], (count, 1))
    masks: Masks = generator.random((count, num_blocks)) < share
    return masks


def random_images(random: Random, count: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Random images uint8 (count, *size, 3)."""
    return pixels(count, random.getrandbits(32), size)
