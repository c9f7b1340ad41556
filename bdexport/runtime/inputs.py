"""What a caller may pass as images, and the one way from there to the network's input."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.errors import InputError
from bdexport.preprocess import Preprocess

SAID_CHARACTERS = 200  # of another library's message in ours


class _Accepted:
    """What would do, as text; only an error needs it."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._size = preprocess.size

    def __str__(self) -> str:
        return "uint8 (N, h, w, 3) or preprocessed float32 (N, 3, {}, {})".format(*self._size)


def network_input(images: Any, preprocess: Preprocess, max_batch: int | None) -> NDArray[np.float32]:
    """float32 (N, 3, H, W), C-contiguous, from uint8 (N, h, w, 3) of any size or from float32 of that very shape.

    uint8 goes through ``preprocess``; float32 is taken as it is. Raises :class:`InputError` for any other dtype, rank
    or channel count, for values that are not finite, an empty batch and a batch beyond ``max_batch``.
    """
    array = as_array("images", images, "pass each size as a batch of its own")
    accepted = _Accepted(preprocess)
    if array.ndim != 4:
        remedy = "add the batch axis: images[None]" if array.ndim == 3 else None
        raise InputError("images: wrong rank", got=f"{array.dtype} {array.shape}", expected=accepted, remedy=remedy)
    if len(array) == 0:
        raise InputError("images: empty batch", got=array.shape, expected="at least one image")
    if max_batch is not None and len(array) > max_batch:
        remedy = f"pass smaller batches, or rebuild with --max-batch {len(array)}"
        raise InputError(f"images: batch {len(array)} exceeds the bundle's {max_batch}", remedy=remedy)
    if array.dtype == np.uint8:
        return _from_pixels(array, preprocess, accepted)
    if array.dtype == np.float32:
        return _from_floats(array, (3, *preprocess.size), accepted)
    raise InputError("images: wrong dtype", got=array.dtype, expected=accepted, remedy=_dtype_remedy(array))


def device_input(images: Any, device: str) -> Any:
    """``images`` in a GPU's memory as they are: the session checks them. Raises InputError where it has no GPU."""
    if not device.startswith("cuda"):
        remedy = "copy them to the host, or load the bundle with device='cuda'"
        raise InputError("images: in a GPU's memory", got=type(images).__name__, expected=f"on {device}", remedy=remedy)
    return images


def as_array(what: str, values: Any, sizes: str) -> NDArray[Any]:
    """``values`` as an array, by whatever protocol they have. Raises :class:`InputError`, whatever that raises.

    ``sizes``: the remedy where a list holds things of different sizes.
    """
    try:
        return np.asarray(values)
    except MemoryError:
        raise
    except Exception as error:  # code of the caller's objects: anything may come
        said = " ".join(str(error).split())[:SAID_CHARACTERS]
        if isinstance(values, list | tuple) and isinstance(error, ValueError):
            raise InputError(f"{what}: not one array ({said})", remedy=sizes) from error
        told = f"{type(values).__name__} that raises {type(error).__name__}: {said}"
        raise InputError(f"{what}: cannot be read as an array", got=told, remedy=_array_remedy(what, said)) from error


def _array_remedy(what: str, said: str) -> str:
    """What to do about what an object said; torch's words for what numpy does not have, without importing torch."""
    if "requires grad" in said:
        return f"pass {what}.detach()"
    if "ScalarType" in said:
        return f"pass {what}.float(), which is float32"
    return f"pass a numpy array: {what}.cpu().numpy() of a tensor"


def _from_pixels(array: NDArray[np.uint8], preprocess: Preprocess, accepted: _Accepted) -> NDArray[np.float32]:
    if array.shape[3] != 3 or 0 in array.shape:
        raise InputError("images: wrong shape", got=f"uint8 {array.shape}", expected=accepted, remedy=_hint(array))
    return preprocess(array)


def _from_floats(array: NDArray[np.float32], shape: tuple[int, ...], accepted: _Accepted) -> NDArray[np.float32]:
    if array.shape[1:] != shape:
        raise InputError("images: wrong shape", got=f"float32 {array.shape}", expected=accepted, remedy=_hint(array))
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=(1, 2, 3)).argmax())
        raise InputError("images: NaN or infinite values", got=f"some in image {bad}", expected="finite numbers")
    return np.ascontiguousarray(array)


def _hint(array: NDArray[Any]) -> str | None:
    if array.shape[1] == 3 and array.shape[3] != 3 and array.dtype == np.uint8:
        return "uint8 images have their channels last: images.transpose(0, 2, 3, 1)"
    if array.shape[3] == 3 and array.shape[1] != 3:
        return "float32 images have their channels first: images.transpose(0, 3, 1, 2), after preprocessing"
    if array.shape[3] == 1:
        return "repeat the grey channel: images.repeat(3, axis=3)"
    return None


def _dtype_remedy(array: NDArray[Any]) -> str | None:
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        return "pass images.astype(numpy.float32) if they are preprocessed"
    return "pass images.astype(numpy.uint8) if the values are pixels in 0..255" if array.dtype.kind in "iu" else None
