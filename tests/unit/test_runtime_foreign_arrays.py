"""What may be passed as images: tensors, and objects of others that say they are arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from bdexport.cuda.exchange import is_device_array
from bdexport.errors import InputError
from bdexport.preprocess import Preprocess
from bdexport.runtime.decide import checked_masks
from bdexport.runtime.inputs import network_input

PREPROCESS = Preprocess(size=(6, 8))


# ---- arrays of others, and what their protocols do ----------------------------------------------------------------


class Raising:
    """An array's protocol that raises what it likes."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __array__(self, *_arguments: object, **_named: object) -> np.ndarray:
        raise self._error


class NoArray:
    """A protocol that gives something else."""

    def __array__(self, *_arguments: object, **_named: object) -> list[int]:
        return [1, 2]


class Negative:
    """An interface whose shape makes no sense."""

    __array_interface__ = {"shape": (-1, 3, 6, 8), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


class Lying(np.ndarray):
    """An array that says it is what would do, whatever it is."""

    def __getattribute__(self, name: str) -> Any:
        return {"shape": (1, 3, 6, 8), "dtype": np.dtype(np.float32), "ndim": 4}.get(name) or super().__getattribute__(
            name
        )


def tensor(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> torch.Tensor:
    return torch.zeros((1, 3, 6, 8), dtype=dtype, requires_grad=requires_grad)


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        (tensor(requires_grad=True), ("cannot be read as an array", "pass images.detach()")),
        (tensor(dtype=torch.bfloat16), ("cannot be read as an array", "pass images.float()")),
        (tensor(dtype=torch.float16), ("wrong dtype", "float16", "astype(numpy.float32)")),
        (np.zeros((1, 3, 6, 8), ml_dtypes.bfloat16), ("wrong dtype", "bfloat16", "astype(numpy.float32)")),
        (tensor().to_sparse(), ("cannot be read as an array", "Sparse")),
        (Raising(KeyError("one\ntwo")), ("Raising that raises KeyError", "pass a numpy array")),
        (Raising(ZeroDivisionError()), ("Raising that raises ZeroDivisionError",)),
        (Raising(ValueError("n" * 9000)), ("Raising that raises ValueError",)),
        (NoArray(), ("NoArray that raises",)),
        (Negative(), ("Negative that raises ValueError",)),
        (np.zeros((1, 2, 3, 4)).view(Lying), ("wrong dtype: got float64",)),
        (np.zeros((1, 2, 3, 4), np.float32).view(Lying), ("wrong shape: got float32 (1, 2, 3, 4)",)),
        (((1, 2), (3,)), ("not one array", "pass each size as a batch of its own")),
    ],
)
def test_what_is_no_plain_array_is_refused_with_the_remedy(images: object, texts: tuple[str, ...]) -> None:
    """Oracle: the contract: InputError, one short line, whatever an object's own code does."""
    with pytest.raises(InputError) as caught:
        network_input(images, PREPROCESS, None)
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_plain_tensors_are_arrays() -> None:
    """Oracle: the tensor's own values; no copy of torch's rules is needed for these."""
    values = torch.rand(2, 3, 6, 8)
    assert np.array_equal(network_input(values, PREPROCESS, None), values.numpy())
    pixels = torch.randint(0, 256, (2, 6, 8, 3), dtype=torch.uint8)
    assert np.array_equal(network_input(pixels, PREPROCESS, None), PREPROCESS(pixels.numpy()))


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ([[True], [True, False]], r"masks: not one array .*; pass one row of 3 booleans for each image"),
        (Raising(OSError("gone")), r"masks: cannot be read as an array: got Raising that raises OSError: gone"),
        (torch.ones(2, 3, requires_grad=True), r"masks: cannot be read .*; pass masks.detach\(\)"),
        (np.ones((2, 3), np.uint8), r"masks: wrong dtype"),
        (np.ones((2, 4), bool), r"masks: wrong shape"),
    ],
)
def test_masks_that_are_none_are_refused(masks: object, text: str) -> None:
    """Oracle: the contract: InputError with the remedy."""
    with pytest.raises(InputError, match=text):
        checked_masks(masks, 2, 3)


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError("no device"), TypeError("none")])
def test_a_place_that_cannot_be_told_is_an_input_error(error: Exception) -> None:
    """Oracle: the contract, for objects whose DLPack protocol raises, and for one that has no place at all."""

    class Nowhere:
        def __dlpack_device__(self) -> tuple[int, int]:
            raise error

    with pytest.raises(InputError, match=r"where they lie cannot be told.*pass a numpy array"):
        is_device_array(Nowhere())
    with pytest.raises(InputError, match="where they lie cannot be told"):
        is_device_array(torch.zeros(1, device="meta"))
