"""A few images inside a JSON document: what int8 and fp8 bundles are verified on, since scales hold for such images."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.bundle_checks import REBUILD
from bdexport.errors import BundleError
from bdexport.json_text import json_kind, shown

CALIBRATION = "calibration"  # in a manifest's extra: what scales were gathered from
MOST_IMAGES, MOST_BYTES = 16, 200_000  # one image of 224x224 has 150,528 bytes


def samples_to_json(images: NDArray[np.uint8]) -> dict[str, Any]:
    """The first images of uint8 (N, H, W, 3), as many as fit; at least one."""
    count = max(1, min(MOST_IMAGES, len(images), MOST_BYTES // images[0].nbytes))
    chosen = np.ascontiguousarray(images[:count])
    return {"shape": list(chosen.shape), "base64": base64.b64encode(chosen.tobytes()).decode()}


def samples_from_json(data: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Inverse of :func:`samples_to_json`, for images of ``size`` (height, width). Raises BundleError for others."""
    where = f"manifest.json: extra.{CALIBRATION}.samples"
    if not isinstance(data, dict):
        raise BundleError(where, got=json_kind(data), expected="an object with shape and base64", remedy=REBUILD)
    shape, text = data.get("shape"), data.get("base64")
    counts = [[count, *size, 3] for count in range(1, MOST_IMAGES + 1)]
    if shape not in counts or not all(type(number) is int for number in shape):
        got, expected = shown(shape), f"[N, {size[0]}, {size[1]}, 3] with N in 1..{MOST_IMAGES}"
        raise BundleError(f"{where}: shape", got=got, expected=expected, remedy=REBUILD)
    try:
        pixels = np.frombuffer(base64.b64decode(text, validate=True), np.uint8) if isinstance(text, str) else None
    except ValueError:  # other characters, or their number is none that base64 gives
        pixels = None
    wanted = int(np.prod(shape))
    if pixels is None or len(pixels) != wanted:
        got = "a text that is not base64" if isinstance(text, str) else json_kind(text)
        got = got if pixels is None else f"{len(pixels)} bytes"
        expected = f"{wanted} bytes in base64, one for each channel of each pixel"
        raise BundleError(f"{where}: base64", got=got, expected=expected, remedy=REBUILD)
    return pixels.reshape(shape)
