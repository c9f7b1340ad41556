"""Training data: the whole split as uint8 on the device; augmentation and normalisation there, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdexport.preprocess import Preprocess
from bdexport.train.distributed import ALONE, World


@dataclass(frozen=True)
class Augmentation:
    """Random shift by up to ``shift`` pixels (the border repeats zeros) and, where it makes sense, a mirror image."""

    shift: int = 4
    flip: bool = True


# A mirrored digit is another sign; a mirrored photograph is not another object.
AUGMENTATION = {"digits": Augmentation(shift=2, flip=False)}


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
    ) -> Iterator[Batch]:
        """A shuffled, augmented pass over ``share`` of the images; the last, short batch is left out.

        ``batch`` counts the images of all processes; each gets its shard.
        """
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        batch = min(batch, len(self) - len(self) % world.size)
        for step in range(steps_per_epoch(len(self), batch, share)):
            rows = world.mine(order[step * batch : (step + 1) * batch]).to(self.labels.device)
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


def steps_per_epoch(images: int, batch: int, share: float) -> int:
    """Batches in a pass over ``share`` of the images, at least one."""
    return max(1, int(images * share) // min(batch, images))


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
