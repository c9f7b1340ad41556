"""How a batch is run once its masks are known: block by block on the images that keep it, never image by image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bdexport.backends.base import Rows
from bdexport.parts import Masks


@dataclass(frozen=True)
class BlockStep:
    """Block ``index``: the rows of the batch that keep it and those that drop it, ascending; either may be empty."""

    index: int
    kept: Rows
    dropped: Rows


@dataclass(frozen=True, eq=False)
class Plan:
    """The order in which a batch is run. Row i of the run is image ``order[i]``; None: the order given.

    ``masks`` (N, K) are in that order. ``uniform``: every image has the same mask.
    """

    order: Rows | None
    masks: Masks
    uniform: bool

    def groups(self) -> Iterator[tuple[int, int]]:
        """(first row, end) of every run of equal masks, in order; each mask has one run."""
        changes = np.flatnonzero((self.masks[1:] != self.masks[:-1]).any(axis=1)) + 1
        ends = [*changes.tolist(), len(self.masks)]
        return zip([0, *ends[:-1]], ends, strict=True)

    def shares(self, number: int) -> list[Rows]:
        """The rows in ``number`` runs (one a row, where there are fewer), of about as many kept blocks each."""
        images, number = len(self.masks), min(number, len(self.masks))
        work = np.concatenate([[0], (self.masks.sum(axis=1) + 1).cumsum()])  # 1: stem and head
        cuts = [0]
        for share in range(1, number):
            nearest = int(np.abs(work - work[-1] * share / number).argmin())
            cuts.append(min(max(nearest, cuts[-1] + 1), images - number + share))  # no share is empty
        return [np.arange(begin, end) for begin, end in zip(cuts, [*cuts[1:], images], strict=True)]

    def part(self, rows: Rows) -> Plan:
        """The plan of some of the rows, ascending: a batch of its own in that order."""
        masks = self.masks[rows]
        return Plan(None, masks, uniform=not (masks != masks[0]).any())

    def steps(self) -> Iterator[BlockStep]:
        """The K blocks in order of execution."""
        for index in range(self.masks.shape[1]):
            keep = self.masks[:, index]
            yield BlockStep(index, np.flatnonzero(keep), np.flatnonzero(~keep))


def plan_batch(masks: Masks) -> Plan:
    """Sort images by mask, so that equal masks lie side by side and rows are moved in few, contiguous runs.

    Block 0 is the first key: the early blocks' tensors are the largest, and theirs become one run each.
    """
    if len(masks) == 1 or not (masks != masks[0]).any():
        return Plan(None, masks, uniform=True)
    order = np.lexsort(masks.T[::-1])
    return Plan(order, masks[order], uniform=False)
