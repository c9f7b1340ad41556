"""Tensor specs: what a part takes and gives, and the check that an array fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.errors import InputError

Array = NDArray[Any]
BATCH = "N"  # the one symbolic dimension; always the first


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (numpy's name for it) and shape of a tensor; the first dimension is the batch and is free."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # without the batch dimension

    def to_json(self) -> dict[str, Any]:
        """``{"name", "dtype", "shape": ["N", ...]}`` as the manifest writes it."""
        return {"name": self.name, "dtype": self.dtype, "shape": [BATCH, *self.shape]}

    def check(self, array: Array, what: str) -> None:
        """Raise :class:`InputError` unless ``array`` has this dtype and shape (any batch >= 1)."""
        if array.dtype != np.dtype(self.dtype):
            raise InputError(f"{what}: wrong dtype", got=array.dtype, expected=self.dtype)
        if array.ndim != len(self.shape) + 1 or array.shape[1:] != self.shape:
            expected = "(" + ", ".join([BATCH, *map(str, self.shape)]) + ")"
            raise InputError(f"{what}: wrong shape", got=array.shape, expected=expected)
        if array.shape[0] == 0:
            raise InputError(f"{what}: empty batch", got=array.shape, expected="at least one image")


def tensor_spec_from_json(data: dict[str, Any]) -> TensorSpec:
    """Inverse of :meth:`TensorSpec.to_json`; raises KeyError, TypeError or ValueError on anything else."""
    name, dtype, shape = data["name"], data["dtype"], data["shape"]
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list) or shape[:1] != [BATCH]:
        raise ValueError(f"not a tensor spec: {data!r}")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape[1:]):
        raise ValueError(f"not a tensor shape: {shape!r}")
    np.dtype(dtype)
    return TensorSpec(name, dtype, tuple(shape[1:]))
