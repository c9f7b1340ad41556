"""From keep-probabilities to masks (Wu et al., CVPR 2018, section 3.2): greedy, no exploration at inference."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.errors import BackendError, InputError
from bdexport.parts import KEEP_THRESHOLD, Masks
from bdexport.runtime.inputs import as_array


def masks_from_probabilities(probabilities: NDArray[np.float32]) -> Masks:
    """Keep block k where p >= 0.5: (N, K) -> bool (N, K).

    Raises :class:`BackendError` when a probability is not a number: a comparison would silently drop the block.
    """
    if not all_finite(probabilities):
        raise BackendError("policy: keep-probabilities are not finite", remedy="run `bdexport verify BUNDLE`")
    masks: Masks = probabilities >= KEEP_THRESHOLD
    return masks


def all_finite(values: NDArray[np.float32]) -> bool:
    """Whether no value is NaN or infinite. The square sum tells in one BLAS call; only if it overflows, look closer."""
    return isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def checked_masks(masks: Any, batch: int, num_blocks: int) -> Masks:
    """Masks that a caller forces: bool (N, K). Raises :class:`InputError` for anything else."""
    array = as_array("masks", masks, f"pass one row of {num_blocks} booleans for each image")
    if array.dtype != np.bool_:
        raise InputError("masks: wrong dtype", got=array.dtype, expected="bool", remedy="pass masks.astype(bool)")
    if array.shape != (batch, num_blocks):
        expected = f"({batch}, {num_blocks}): one row per image, one column per block"
        raise InputError("masks: wrong shape", got=array.shape, expected=expected)
    return array
