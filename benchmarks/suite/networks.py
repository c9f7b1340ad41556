"""Checkpoints (trained, or of random weights), the bundles made of them, images and masks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bdexport.architecture import policy_spec, resnet_spec
from bdexport.backends import BACKENDS, backend_class
from bdexport.build import build_bundle
from bdexport.bundle import Bundle, open_bundle
from bdexport.calibrate import CalibrationRequest
from bdexport.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from bdexport.checkpoint.reading import checkpoint_file
from bdexport.config import CALIBRATED, BuildConfig, FusedConfig, VerifyConfig
from bdexport.dataset import load_dataset
from bdexport.errors import BdexportError
from bdexport.files import sha256_file
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import Block
from bdexport.parts import Masks, mask_to_text
from bdexport.preprocess import Preprocess
from benchmarks.suite.plan import IMAGENET_MODELS, Cell, SuiteConfig

NOT_MEASURED = ("torch", "null")  # the reference of verification, and declared latencies
BRANCH_SCALE = 0.3  # of a random block's branch: activations stay of one order through 54 blocks, as in trained ones
# Of each number of kept blocks: with ten numbers, no more than fused paths are built by default. At 224 x 224 loading
# that many engines would take longer than measuring them.
SWEEP_MASKS, LARGE_SWEEP_MASKS = 2, 1
# Of random weights a bundle is verified on fewer images and masks: at 224 x 224 the default takes minutes for each.
RANDOM_VERIFY = VerifyConfig(images=2, random_masks=20, frequent_masks=5)
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Network:
    """A model of the suite: its checkpoint file, and the model built from it."""

    name: str
    path: Path | str
    checkpoint: Checkpoint
    model: BlockDropNet
    trained: bool

    @cached_property
    def sha256(self) -> str:
        """Of the checkpoint's file."""
        return sha256_file(checkpoint_file(Path(self.path)))

    @property
    def label(self) -> str:
        """How files that are made of it begin."""
        return f"{self.name}-{self.sha256[:12]}"


def network(cell: Cell, config: SuiteConfig, work: Path) -> Network:
    """The cell's model: the checkpoint that was given for it, or random weights, made once.

    A sweep always has random weights, whose policy statistics name the sweep's masks: so the executor for frequent
    masks has an engine for each of them.
    """
    name = cell.model
    given = None if cell.usage == "sweep" else config.checkpoints.get(name)
    levels = "-".join(f"{100 * share:.0f}" for share in config.sweep)
    random = work / f"{name}-random-{levels}x{masks_of_a_number(name)}.safetensors"
    path: Path | str = given if given is not None else random
    if given is None and not Path(path).exists():
        _save_random(name, Path(path), config)
    checkpoint = load_checkpoint(path)
    return Network(name, path, checkpoint, build_model(checkpoint).eval(), trained=given is not None)


def masks_of_a_number(name: str) -> int:
    """How many masks a sweep has of each number of kept blocks."""
    return LARGE_SWEEP_MASKS if name in IMAGENET_MODELS else SWEEP_MASKS


def sweep_masks(num_blocks: int, shares: Sequence[float], each: int = SWEEP_MASKS) -> dict[int, Masks]:
    """Masks (``each``, K) by number of kept blocks, the same every time."""
    rng = np.random.default_rng(1)
    counts = sorted({max(1, round(share * num_blocks)) for share in shares})
    return {count: random_masks(rng, (each,), num_blocks, count) for count in counts}


def _save_random(name: str, path: Path, config: SuiteConfig) -> None:
    """Random weights: time does not depend on them, as long as no activation runs off."""
    torch.manual_seed(0)
    spec = resnet_spec(name)
    model = BlockDropNet(spec).eval()
    with torch.no_grad():
        for block in model.network.blocks:
            assert isinstance(block, Block)
            last = block.branch.bn3 if hasattr(block.branch, "bn3") else block.branch.bn2
            last.weight.fill_(BRANCH_SCALE)  # type: ignore[operator, union-attr]
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    names = tuple(str(index) for index in range(spec.num_classes))
    size = (spec.image_size, spec.image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    training = {"policy_statistics": _statistics(sweep_masks(spec.num_blocks, config.sweep, masks_of_a_number(name)))}
    save_checkpoint(path, Checkpoint(spec, policy_spec(spec), Preprocess(size), names, state, training=training))


def _statistics(masks: dict[int, Masks]) -> dict[str, Any]:
    """Every mask of the sweep as often as the others."""
    texts = dict.fromkeys(mask_to_text(mask) for choices in masks.values() for mask in choices)
    rows = [{"mask": text, "count": 1, "share": 1 / len(texts)} for text in texts]
    return {"split": "validation", "images": len(texts), "masks": rows}


def variants() -> list[tuple[str, str]]:
    """(backend, precision) of every engine that is measured."""
    return [
        (backend, precision)
        for backend in BACKENDS
        if backend not in NOT_MEASURED
        for precision in backend_class(backend).precisions
    ]


def bundle(
    chosen: Network,
    backend: str,
    precision: str,
    work: Path,
    calibration: Callable[[], CalibrationRequest] | None = None,
    source: str = "",
    progress: Callable[[str, float, int], None] | None = None,
) -> Bundle:
    """The bundle of a network, built unless an earlier run left it. Raises what the build raises.

    ``calibration``: where int8's and fp8's scales are, only called when a bundle is built; ``source``: whose images.
    """
    # The build measures executors at batch 64: minutes at 224 x 224, for masks that mean nothing. auto is then fused.
    quick = not chosen.trained and chosen.name in IMAGENET_MODELS
    config = BuildConfig(backend=backend, precision=precision, fused=FusedConfig(measure=not quick))
    settings = zlib.crc32((repr(config) + (source if precision in CALIBRATED else "")).encode())
    out = work / f"{chosen.label}-{backend}-{precision}-{settings:08x}"
    if out.is_dir():
        try:
            return open_bundle(out)
        except BdexportError:
            pass  # of another version of the format, or damaged: build it again
    return build_bundle(
        chosen.path,
        out,
        config=config,
        overwrite=True,
        cache_dir=work / "cache",
        calibration=calibration() if calibration is not None and precision in CALIBRATED else None,
        verify=None if chosen.trained else RANDOM_VERIFY,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the rounds of a cell run. ``images`` float32 (M, 3, H, W), preprocessed; ``masks`` bool (R, batch, K) by
    number of kept blocks, empty where the policy decides.
    """

    images: Images
    batch: int
    masks: dict[int, Masks]

    def batch_of(self, number: int) -> Images:
        """The images of a round; rounds go through all of them."""
        batches = len(self.images) // self.batch
        start = (number % batches) * self.batch
        return self.images[start : start + self.batch]

    def masks_of(self, kept: int, number: int) -> Masks:
        """The masks (batch, K) of a round."""
        choices = self.masks[kept]
        masks: Masks = choices[number % len(choices)]
        return masks


def inputs(chosen: Network, cell: Cell, config: SuiteConfig) -> Inputs:
    """Images and masks of a cell: test images where a policy decides, random ones otherwise."""
    preprocess, num_blocks = chosen.checkpoint.preprocess, chosen.checkpoint.network.num_blocks
    rng = np.random.default_rng(0)
    if cell.usage == "trained":
        pixels = load_dataset(config.dataset, config.data, "test", limit=config.images).arrays(preprocess)
        if len(pixels) < cell.batch:
            pixels = np.resize(pixels, (cell.batch, *pixels.shape[1:]))
    else:
        pixels = rng.integers(0, 256, (cell.batch * (4 if cell.batch < 64 else 1), *preprocess.size, 3), dtype=np.uint8)
    masks: dict[int, Masks] = {}
    if cell.usage == "random":
        kept = max(1, round(config.random_kept * num_blocks))
        masks = {kept: random_masks(rng, (config.masks, cell.batch), num_blocks, kept)}
    elif cell.usage == "sweep":  # the batch has one mask: what blocks cost, not what regrouping does
        found = sweep_masks(num_blocks, config.sweep, masks_of_a_number(cell.model))
        masks = {kept: np.repeat(choices[:, None], cell.batch, axis=1) for kept, choices in found.items()}
    return Inputs(preprocess.normalise(pixels), cell.batch, masks)


def random_masks(rng: np.random.Generator, shape: tuple[int, ...], num_blocks: int, kept: int) -> Masks:
    """Masks (*shape, K), each with ``kept`` blocks at random places."""
    masks: Masks = np.asarray(rng.random((*shape, num_blocks)).argsort(axis=-1) < kept)
    return masks
