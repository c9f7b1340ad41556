"""Bundles for tests of the run-time half: real parts of small networks, for every backend."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from manifests import change_manifest
from numpy.typing import NDArray
from PIL import Image
from tiny import SIZE, tiny_checkpoint

from bdexport.backends import get_backend
from bdexport.backends.base import Backend
from bdexport.build import bundle_from_model
from bdexport.bundle import Bundle
from bdexport.calibrate import CalibrationRequest
from bdexport.config import BuildConfig, CalibrationConfig, FusedConfig
from bdexport.models.pair import BlockDropNet
from bdexport.parts import Masks


def make_bundle(
    folder: Path,
    model: BlockDropNet,
    backend: str | Backend = "onnxruntime",
    max_batch: int | None = None,
    precision: str = BuildConfig.precision,
    calibration: CalibrationRequest | None = None,
) -> Bundle:
    """Build ``model``'s bundle at ``folder``, without a cache; ``calibration``: for a precision that needs scales."""
    chosen = get_backend(backend) if isinstance(backend, str) else backend
    unmeasured = FusedConfig(measure=False)
    config = BuildConfig(backend=chosen.name, max_batch=max_batch, precision=precision, fused=unmeasured)
    built = bundle_from_model(
        model,
        tiny_checkpoint(model),
        folder,
        chosen,
        config=config,
        checkpoint_sha256="0" * 64,
        overwrite=True,
        calibration=calibration,
    )
    return Bundle(built.path, built.manifest)


def with_engine(bundle: Bundle, folder: Path, part: str, data: bytes) -> Path:
    """A copy of ``bundle`` in ``folder`` whose engine of ``part`` is ``data``, with hashes that fit it."""
    copy = Path(shutil.copytree(bundle.path, folder))

    def put(manifest: dict[str, Any]) -> None:
        entry = next(entry for entry in manifest["parts"] if entry["name"] == part)["engine"]
        (copy / entry["path"]).write_bytes(data)
        entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    change_manifest(copy, put)
    return copy


def calibration_images(folder: Path, count: int = 24) -> CalibrationRequest:
    """Random images of the tiny networks' three classes in ``folder``, to gather scales on."""
    for index, image in enumerate(pixels(count)):
        path = folder / "images" / ("cat", "dog", "newt")[index % 3] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    config = CalibrationConfig(images=count, folder=str(folder / "scales"))
    return CalibrationRequest(config, "folder", folder / "images")


def pixels(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Random images uint8 (count, *size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def some_masks(count: int, num_blocks: int, seed: int = 0) -> Masks:
    """Random masks (count, K); the first keeps everything, the second nothing."""
    masks: Masks = np.random.default_rng(seed).random((count, num_blocks)) < 0.5
    masks[:1], masks[1:2] = True, False
    return masks


def torch_logits(model: BlockDropNet, inputs: NDArray[np.float32], masks: Masks) -> NDArray[np.float32]:
    """The oracle: ``forward_masked`` of the model that the bundle was built from."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model.network.forward_masked(torch.tensor(inputs), torch.tensor(masks)).numpy()
    return logits


def assert_close(got: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance``; a failure prints the largest and the mean difference."""
    gap = np.abs(got - expected)
    assert gap.shape == expected.shape
    assert gap.max() <= tolerance, f"largest difference {gap.max():.2e}, mean {gap.mean():.2e}"


def rows(values: Iterable[int]) -> NDArray[np.intp]:
    """Row numbers as the run time passes them."""
    return np.array(list(values), dtype=np.intp)
