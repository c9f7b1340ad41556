"""Many callers of one orchestrator get what one gets: a small case always, the real one with ``make test-long``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle, pixels
from numpy.typing import NDArray
from test_fused import build, calibration
from tiny import tiny_model

import bdexport
from bdexport.build import build_bundle
from bdexport.bundle import Bundle
from bdexport.dataset import load_dataset
from bdexport.errors import BdexportError
from bdexport.runtime import Orchestrator, Result

CALLERS = 8
BATCHES = (1, 1, 1, 7)  # images of one call after another, over and over


def calls_of(count: int) -> list[slice]:
    """Rows of calls that together take every image once."""
    ends = np.cumsum([BATCHES[number % len(BATCHES)] for number in range(count)])
    ends = np.append(ends[ends < count], count)
    return [slice(int(begin), int(end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def differing(serial: Sequence[Result], together: Sequence[Result]) -> list[int]:
    """Calls whose masks or logits are not bit for bit the same."""
    pairs = enumerate(zip(serial, together, strict=True))
    return [
        number
        for number, (one, other) in pairs
        if not (np.array_equal(one.masks, other.masks) and np.array_equal(one.logits, other.logits))
    ]


def check(orchestrator: Orchestrator, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Run the images serially and by :data:`CALLERS` threads; returns the masks (N, K)."""
    rows = calls_of(len(images))
    serial = [orchestrator(images[row]) for row in rows]
    with ThreadPoolExecutor(CALLERS) as pool:
        together = list(pool.map(lambda row: orchestrator(images[row]), rows))
    wrong = differing(serial, together)
    assert not wrong, f"{len(wrong)} of {len(rows)} calls differ, the first is {wrong[0]}"
    return np.concatenate([result.masks for result in together])


def test_calls_take_every_image_once() -> None:
    """Oracle: the row numbers themselves."""
    rows = [row for call in calls_of(1003) for row in range(1003)[call]]
    assert rows == list(range(1003))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three blocks; two masks of those that occur have engines of their own."""
    return build(tmp_path_factory.mktemp("small"), calibration=calibration(), paths=2)


@pytest.mark.parametrize("executor", ["chain", "fused", "auto"])
def test_eight_callers_and_a_thousand_images(small: Bundle, executor: str) -> None:
    """Oracle: the serial results, bit for bit."""
    with bdexport.load(small, executor=executor, threads=1) as orchestrator:
        check(orchestrator, pixels(1000))


def test_a_difference_is_found(tmp_path: Path) -> None:
    """Oracle: results of other images: the comparison above can fail."""
    with bdexport.load(make_bundle(tmp_path / "bundle", tiny_model()), threads=1) as orchestrator:
        first, second = (orchestrator(pixels(1, seed)) for seed in (1, 2))
    assert differing([first, first], [first, second]) == [1]


# ---- the real one ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10() -> NDArray[np.uint8]:
    """CIFAR-10's test images, uint8 (10000, 32, 32, 3)."""
    folder = os.environ.get("BDEXPORT_CIFAR10")
    if folder is None:
        pytest.skip("set BDEXPORT_CIFAR10 to the folder of CIFAR-10's python version")
    try:
        return np.asarray(load_dataset("cifar10", Path(folder), "test").source)
    except BdexportError as error:
        pytest.skip(f"BDEXPORT_CIFAR10: {error}")


@pytest.fixture(scope="module")
def resnet32(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_bundle("zoo:resnet32-cifar10", tmp_path_factory.mktemp("resnet32") / "bundle")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("executor", ["chain", "fused", "auto"])
def test_eight_callers_and_the_whole_test_set(resnet32: Bundle, cifar10: NDArray[np.uint8], executor: str) -> None:
    """Oracle: the serial results, bit for bit; hits and misses of the fused paths are both among them."""
    with bdexport.load(resnet32, executor=executor) as orchestrator:
        masks = check(orchestrator, cifar10)
        assert masks.shape == (10_000, 15)
        if executor == "fused":
            assert orchestrator.hit_rate is not None
            assert 0 < orchestrator.hit_rate < 1
