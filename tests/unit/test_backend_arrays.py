"""Rows of numpy batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bdexport.backends.arrays import ArrayRows, row_span


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_span_is_found_exactly_where_rows_have_no_gap(length: int) -> None:
    """Oracle: all ordered choices of rows out of five, compared with the range that they would be."""
    for chosen in itertools.permutations(range(5), length):
        span = row_span(np.array(chosen, np.intp))
        if list(chosen) == list(range(chosen[0], chosen[0] + length)):
            assert span == slice(chosen[0], chosen[0] + length)
        else:
            assert span is None


def test_contiguous_rows_are_not_copied() -> None:
    """Property: a view for a span, a copy otherwise."""
    x = np.arange(12.0).reshape(6, 2)
    assert np.shares_memory(ArrayRows().take(x, np.array([2, 3, 4])), x)
    assert not np.shares_memory(ArrayRows().take(x, np.array([2, 4])), x)
