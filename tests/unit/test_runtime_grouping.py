"""Decisions and plans."""

from __future__ import annotations

import numpy as np
import pytest

from bdexport.errors import BackendError, InputError
from bdexport.runtime.decide import all_finite, checked_masks, masks_from_probabilities
from bdexport.runtime.grouping import plan_batch


def test_a_block_is_kept_from_one_half_on() -> None:
    """Oracle: the rule p >= 0.5, at the threshold and one step of float32 below it."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    probabilities = np.array([[0.5, below, 1.0, 0.0]], np.float32)
    assert masks_from_probabilities(probabilities).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_probability_that_is_no_number_is_an_error(value: float) -> None:
    """Oracle: the contract: a comparison with NaN would drop the block without a word."""
    with pytest.raises(BackendError, match="not finite"):
        masks_from_probabilities(np.array([[0.1, value]], np.float32))


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True),
        ([3e38, 3e38, -3e38], True),
        ([np.inf, 0.0], False),
        ([np.inf, -np.inf], False),
        ([0.0, np.nan], False),
    ],
)
def test_finite_means_every_value(values: list[float], finite: bool) -> None:
    """Oracle: numpy's isfinite, also where squares overflow."""
    assert all_finite(np.array([values], np.float32)) is finite


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        (np.ones((2, 3), np.uint8), "wrong dtype"),
        (np.ones((3, 2), bool), "wrong shape"),
        (np.ones(3, bool), "wrong shape"),
        ([[0.5, 1.0, 0.0]] * 2, "wrong dtype"),
    ],
)
def test_forced_masks_are_checked(masks: object, text: str) -> None:
    """Oracle: the contract: bool (N, K)."""
    with pytest.raises(InputError, match=text):
        checked_masks(masks, 2, 3)


def test_forced_masks_may_be_a_list() -> None:
    """Oracle: numpy's conversion."""
    assert checked_masks([[True, False]], 1, 2).tolist() == [[True, False]]


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_runs_every_image_under_its_own_mask(seed: int) -> None:
    """Property: the order is a permutation, row i runs the mask of image order[i], and steps split the batch."""
    generator = np.random.default_rng(seed)
    masks = generator.random((int(generator.integers(1, 12)), 6)) < generator.random()
    plan = plan_batch(masks)
    order = np.arange(len(masks)) if plan.order is None else plan.order
    assert sorted(order.tolist()) == list(range(len(masks)))
    assert np.array_equal(plan.masks, masks[order])
    assert plan.uniform == (len(np.unique(masks, axis=0)) == 1)
    for step in plan.steps():
        assert np.array_equal(np.union1d(step.kept, step.dropped), np.arange(len(masks)))
        assert plan.masks[step.kept, step.index].all()
        assert not plan.masks[step.dropped, step.index].any()


def test_equal_masks_lie_side_by_side() -> None:
    """Property: as many runs of equal rows as there are different masks; block 0's rows are one run each."""
    masks = np.random.default_rng(0).random((40, 3)) < 0.5
    sorted_masks = plan_batch(masks).masks
    runs = 1 + int((sorted_masks[1:] != sorted_masks[:-1]).any(axis=1).sum())
    assert runs == len(np.unique(masks, axis=0))
    assert int((sorted_masks[1:, 0] != sorted_masks[:-1, 0]).sum()) == 1
