"""Batches on the device: augmentation, normalisation, order."""

from __future__ import annotations

import numpy as np
import torch

from bdexport.preprocess import Preprocess
from bdexport.train.data import Augmentation, DeviceImages, augment, steps_per_epoch

PRE = Preprocess(size=(8, 8))


def some_images(count: int = 10) -> DeviceImages:
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return DeviceImages(images, np.arange(count), PRE, "cpu")


def test_batches_are_the_preprocessing() -> None:
    """Oracle: the numpy preprocessing that inference uses."""
    data = some_images()
    got = torch.cat([images for images, _ in data.batches(4)])
    expected = PRE(data.images.numpy())
    assert np.abs(got.numpy() - expected).max() < 1e-5
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_no_shift_and_no_flip_is_the_image() -> None:
    """Oracle: identity."""
    images = some_images().images
    assert torch.equal(augment(images, Augmentation(0, False), torch.Generator().manual_seed(0)), images)


def test_every_augmented_image_is_a_shifted_or_mirrored_original() -> None:
    """Oracle: all (2s+1)^2 x 2 possibilities, enumerated."""
    images = some_images(20).images
    out = augment(images, Augmentation(2, True), torch.Generator().manual_seed(0))
    changed = 0
    for image, got in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(image, (0, 0, 2, 2, 2, 2))
        options = [padded[r : r + 8, c : c + 8] for r in range(5) for c in range(5)]
        options += [option.flip(1) for option in options]
        assert any(torch.equal(got, option) for option in options)
        changed += not torch.equal(got, image)
    assert changed > 10


def test_an_epoch_visits_every_image_once() -> None:
    """Oracle: the labels are a permutation, whole batches only; a share of the set takes that many steps."""
    data = some_images(12)
    generator = torch.Generator().manual_seed(3)
    labels = torch.cat([batch.labels for batch in data.epoch(4, 1.0, Augmentation(), generator)])
    assert sorted(labels.tolist()) == list(range(12))
    assert steps_per_epoch(12, 4, 0.5) == 1
    assert steps_per_epoch(3, 128, 1.0) == 1


def test_the_generator_decides_everything() -> None:
    """Oracle: equal seeds, equal batches; other seeds, other batches."""

    def first(seed: int) -> torch.Tensor:
        return next(iter(some_images().epoch(4, 1.0, Augmentation(), torch.Generator().manual_seed(seed))))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
