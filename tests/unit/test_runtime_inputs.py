"""What may be passed as images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bdexport.errors import InputError
from bdexport.preprocess import Preprocess
from bdexport.runtime.inputs import network_input

PREPROCESS = Preprocess(size=(6, 8))
GENERATOR = np.random.default_rng(0)


def uint8(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


def float32(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def test_pixels_of_the_right_size_are_normalised() -> None:
    """Oracle: the stated preprocessing, written out."""
    images = uint8(3, 6, 8, 3)
    expected = (images.transpose(0, 3, 1, 2) / 255 - np.array(PREPROCESS.mean)[:, None, None]) / np.array(
        PREPROCESS.std
    )[:, None, None]
    got = network_input(images, PREPROCESS, None)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert np.allclose(got, expected, atol=1e-5)


def test_pixels_of_another_size_are_fitted() -> None:
    """Oracle: the preprocessing of the same images as Pillow images."""
    images = uint8(2, 13, 9, 3)
    fitted = np.stack([PREPROCESS.fit_image(Image.fromarray(image)) for image in images])
    assert np.array_equal(network_input(images, PREPROCESS, None), PREPROCESS.normalise(fitted))


def test_floats_are_taken_as_they_are() -> None:
    """Oracle: identity; a strided view becomes contiguous."""
    images = float32(4, 3, 6, 8)
    assert np.array_equal(network_input(images, PREPROCESS, None), images)
    assert network_input(images[::2], PREPROCESS, None).flags.c_contiguous


def nan_image() -> np.ndarray:
    images = float32(3, 3, 6, 8)
    images[1, 2, 3, 4] = np.nan
    return images


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        (uint8(6, 8, 3), ("rank", "images[None]")),
        (float32(3, 6, 8), ("rank", "images[None]")),
        (uint8(8), ("rank",)),
        (uint8(0, 6, 8, 3), ("empty batch",)),
        (float32(0, 3, 6, 8), ("empty batch",)),
        (uint8(2, 0, 8, 3), ("shape",)),
        (uint8(2, 6, 8, 1), ("shape", "repeat")),
        (uint8(2, 6, 8, 4), ("shape",)),
        (uint8(2, 3, 6, 8), ("shape", "transpose(0, 2, 3, 1)")),
        (float32(2, 6, 8, 3), ("shape", "transpose(0, 3, 1, 2)")),
        (float32(2, 3, 6, 9), ("shape", "(N, 3, 6, 8)")),
        (float32(2, 1, 6, 8), ("shape",)),
        (float32(2, 3, 6, 8).astype(np.float64), ("dtype", "float64", "astype(numpy.float32)")),
        (uint8(2, 6, 8, 3).astype(np.int64), ("dtype", "astype(numpy.uint8)")),
        (np.full((2, 6, 8, 3), "a"), ("dtype",)),
        (nan_image(), ("NaN", "image 1")),
        (-np.inf * np.ones((1, 3, 6, 8), np.float32), ("infinite", "image 0")),
        ([uint8(6, 8, 3), uint8(5, 8, 3)], ("not one array",)),
        (None, ("rank",)),
    ],
    ids=lambda value: (
        None if isinstance(value, tuple) else f"{getattr(value, 'dtype', '')}{getattr(value, 'shape', '')}"
    ),
)
def test_everything_else_is_refused_with_what_would_do(images: object, texts: tuple[str, ...]) -> None:
    """Oracle: the contract: InputError, one line, naming what is wrong and the remedy."""
    with pytest.raises(InputError) as caught:
        network_input(images, PREPROCESS, None)
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_beyond_the_profile_is_refused() -> None:
    """Oracle: the contract: the profile's own size passes, one more does not, and the remedy names it."""
    assert len(network_input(uint8(4, 6, 8, 3), PREPROCESS, 4)) == 4
    with pytest.raises(InputError, match=r"batch 5 exceeds the bundle's 4.*--max-batch 5"):
        network_input(uint8(5, 6, 8, 3), PREPROCESS, 4)
