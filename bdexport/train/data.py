"""Training data: the whole split as uint8 on the device; augmentation and normalisation there, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdexport.config import AugmentConfig
from bdexport.preprocess import Preprocess
from bdexport.train.distributed import ALONE, World


@dataclass(frozen=True)
class Augmentation:
    """Random shift by up to ``shift`` pixels (the border repeats zeros) and, where it makes sense, a mirror image."""

    shift: int = 4
    flip: bool = True

    def text(self) -> str:
        """For a person, with the options that change it."""
        moved = f"moved by up to {self.shift} pixels (--shift N)" if self.shift else "not moved (--shift N)"
        mirrored = "every second one mirrored (--no-mirror)" if self.flip else "not mirrored (--mirror)"
        return f"training images are {moved}, {mirrored}"


# A mirrored digit is another sign; a mirrored photograph is not another object.
AUGMENTATION = {"digits": Augmentation(shift=2, flip=False)}


def augmentation_for(dataset: str, config: AugmentConfig) -> Augmentation:
    """What suits a data set, but for what the settings say."""
    usual = AUGMENTATION.get(dataset, Augmentation())
    return Augmentation(
        shift=usual.shift if config.shift is None else config.shift,
        flip=usual.flip if config.mirror is None else config.mirror,
    )


class Batch(NamedTuple):
    """What a phase learns from in one step; ``rows`` (B,) are the images' places in the split."""

    images: Tensor  # float32 (B, 3, H, W), channels_last, augmented and normalised
    labels: Tensor  # int64 (B,)
    rows: Tensor  # int64 (B,)


class DeviceImages:
    """Images uint8 (N, H, W, 3) and labels (N,) on one device, given out as normalised channels_last batches."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], pre: Preprocess, device: str) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(device)
        self.scale = torch.tensor([1 / (255 * s) for s in pre.std], device=device)
        self.offset = torch.tensor([m / s for m, s in zip(pre.mean, pre.std, strict=True)], device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The given images, not augmented: float32 (B, 3, H, W) in channels_last memory, and labels (B,)."""
        return self._normalised(self.images[rows]), self.labels[rows]

    def batches(self, batch: int, limit: int | None = None, world: World = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """In order, not augmented; of several processes, each gets its shard in batches of ``batch``."""
        total = len(self) if limit is None else min(limit, len(self))
        rows = world.mine(torch.arange(total, device=self.labels.device))
        for start in range(0, len(rows), batch):
            yield self.batch(rows[start : start + batch])

    def epoch(
        self,
        batch: int,
        share: float,
        augmentation: Augmentation,
        generator: torch.Generator,
        world: World = ALONE,
        whole: bool = False,
    ) -> Iterator[Batch]:
        """A shuffled, augmented pass over ``share`` of the images.

        What is left over after whole batches is left out, or with ``whole`` spread over the batches, which are then a
        little smaller; of several processes, all must see as many, so that some images fewer than these are left out.
        ``batch`` counts the images of all processes; each gets its shard.
        """
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        batch = min(batch, len(self) - len(self) % world.size)
        steps = steps_per_epoch(len(self), batch, share, whole)
        bounds = [step * batch for step in range(steps + 1)]
        if whole:
            shards = max(1, int(len(self) * share) // world.size)
            bounds = [step * shards // steps * world.size for step in range(steps + 1)]
        for start, end in pairwise(bounds):
            rows = world.mine(order[start:end]).to(self.labels.device)
            images = augment(self.images[rows], augmentation, generator, world)
            yield Batch(self._normalised(images), self.labels[rows], rows)

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() * self.scale - self.offset).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class TrainingData:
    """The held-out split is never trained on; every choice is made on it."""

    train: DeviceImages
    validation: DeviceImages
    augmentation: Augmentation


def steps_per_epoch(images: int, batch: int, share: float, whole: bool = False) -> int:
    """Batches in a pass over ``share`` of the images, at least one; ``whole``: as many as all of these images take."""
    seen, size = int(images * share), min(batch, images)
    return max(1, -(-seen // size) if whole else seen // size)


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator, world: World = ALONE) -> Tensor:
    """Shift (zero border) and mirror each image by its own draw; uint8 (B, H, W, 3) -> the same shape."""
    count, height, width, _ = images.shape
    shift = augmentation.shift
    device = images.device

    def draw(high: int) -> Tensor:
        return world.randint(0, high, count, generator)[:, None].to(device)

    padded = torch.nn.functional.pad(images, (0, 0, shift, shift, shift, shift))
    rows = draw(2 * shift + 1) + torch.arange(height, device=device)
    columns = draw(2 * shift + 1) + torch.arange(width, device=device)
    if augmentation.flip:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    flat = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
    index = flat.reshape(count, -1, 1).expand(-1, -1, 3)
    return padded.reshape(count, -1, 3).gather(1, index).reshape(images.shape)
