"""What the frontier plots draw: accuracy against FLOPs or blocks, ours and the paper's. Pure data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bdexport.report.points import BLOCKDROP, Point, comparable

Axis = Literal["flops", "blocks"]


@dataclass(frozen=True)
class Mark:
    """One point of a plot; ``x_std`` is its error bar. ``below``: its accuracy lies under the plot's lower edge."""

    number: str
    point: Point
    x: float
    x_std: float
    below: bool


@dataclass(frozen=True)
class Frontier:
    """``marks`` in the order of the numbers; ``floor``: the lowest accuracy that is drawn to scale, None: all are."""

    axis: Axis
    marks: tuple[Mark, ...]
    floor: float | None

    @property
    def measured(self) -> tuple[Mark, ...]:
        """Ours."""
        return tuple(mark for mark in self.marks if mark.point.source == "measured")

    @property
    def published(self) -> tuple[Mark, ...]:
        """The paper's."""
        return tuple(mark for mark in self.marks if mark.point.source == "paper")

    def lines(self) -> list[list[Mark]]:
        """BlockDrop's frontier of each network and source, by cost: what a line may connect. Two marks or more.

        A mark that costs more than another one without being more accurate is not on it.
        """
        groups: dict[tuple[str, str | None], list[Mark]] = {}
        for mark in self.marks:
            if mark.point.method == BLOCKDROP and mark.point.finetuned is not False and not mark.below:
                groups.setdefault((mark.point.source, mark.point.architecture), []).append(mark)
        fronts = [_not_dominated(group) for group in groups.values()]
        return [front for front in fronts if len(front) > 1]


def _not_dominated(group: list[Mark]) -> list[Mark]:
    front: list[Mark] = []
    for mark in sorted(group, key=lambda mark: (mark.x, -mark.point.accuracy)):
        if not front or mark.point.accuracy > front[-1].point.accuracy:
            front.append(mark)
    return front


def frontier(numbered: Iterable[tuple[str, Point]], axis: Axis, span: float) -> Frontier:
    """The points that have a value on ``axis``.

    Of ours those that may be compared (:func:`bdexport.report.points.comparable`); of the paper's all that are given.
    ``span``: what is more than so many points of accuracy worse than our best lies below the plot.
    """
    pairs = list(numbered)
    wanted = {id(point) for point in comparable(point for _, point in pairs)}
    shown = [
        (number, point)
        for number, point in pairs
        if getattr(point, axis) is not None and (point.source == "paper" or id(point) in wanted)
    ]
    floor = _floor([point for _, point in shown], span)
    return Frontier(axis, tuple(_mark(number, point, axis, floor) for number, point in shown), floor)


def _floor(points: list[Point], span: float) -> float | None:
    best = max((point.accuracy for point in points if point.source == "measured"), default=None)
    if best is None or all(point.accuracy >= best - span for point in points):
        return None
    return best - span


def _mark(number: str, point: Point, axis: Axis, floor: float | None) -> Mark:
    spread = point.flops if axis == "flops" else point.blocks
    assert spread is not None
    return Mark(number, point, spread.mean, spread.std or 0.0, floor is not None and point.accuracy < floor)
