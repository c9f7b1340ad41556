"""A few images inside a JSON document: what an int8 bundle is verified on, since its scales hold for such images."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.errors import BundleError

CALIBRATION = "calibration"  # in a manifest's extra: what int8's scales were gathered from
MOST_IMAGES, MOST_BYTES = 16, 200_000  # one image of 224x224 has 150,528 bytes


def samples_to_json(images: NDArray[np.uint8]) -> dict[str, Any]:
    """The first images of uint8 (N, H, W, 3), as many as fit; at least one."""
    count = max(1, min(MOST_IMAGES, len(images), MOST_BYTES // images[0].nbytes))
    chosen = np.ascontiguousarray(images[:count])
    return {"shape": list(chosen.shape), "base64": base64.b64encode(chosen.tobytes()).decode()}


def samples_from_json(data: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Inverse of :func:`samples_to_json`, for images of ``size`` (height, width). Raises BundleError for others."""
    try:
        shape = tuple(int(number) for number in data["shape"])
        pixels = np.frombuffer(base64.b64decode(data["base64"], validate=True), np.uint8)
        if len(shape) != 4 or shape[1:] != (*size, 3) or not 1 <= shape[0] <= MOST_IMAGES:
            raise ValueError(f"shape {list(shape)}")
        return pixels.reshape(shape)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        what = "extra.calibration.samples: not the images that they say they are"
        remedy = "copy the bundle again, or rebuild it with `bdexport build`"
        raise BundleError(
            what, got=str(error), expected=f"uint8 [N, {size[0]}, {size[1]}, 3] in base64", remedy=remedy
        ) from error
