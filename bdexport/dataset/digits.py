"""Scikit-learn's handwritten digits: 1,797 real 8x8 images (UCI optdigits, test part) that ship with a dependency."""

from __future__ import annotations

import numpy as np

from bdexport.dataset.base import SPLITS, Dataset
from bdexport.dataset.splits import SplitSettings, split_rows
from bdexport.errors import DatasetError

TEST_SHARE = 0.2  # 360 images; the set has no test part of its own
WHITE = 16  # grey levels 0..16


def load_digits(split: str, settings: SplitSettings) -> Dataset:
    """One split as uint8 RGB (n, 8, 8, 3), grey 0..16 spread over 0..255. Raises :class:`DatasetError`."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DatasetError(
            f"data set digits: scikit-learn cannot be imported ({error})", remedy="pip install scikit-learn"
        ) from error
    data = load()
    labels = np.asarray(data.target, dtype=np.int64)
    grey = np.round(np.asarray(data.images) * (255 / WHITE)).astype(np.uint8)
    test, validation, train = split_rows(labels, (TEST_SHARE, settings.validation_share), settings.seed)
    rows = dict(zip(SPLITS, (train, validation, test), strict=True))[split]
    images = np.repeat(grey[rows][..., None], 3, axis=-1)
    return Dataset("digits", split, tuple(map(str, range(10))), labels[rows], images)
