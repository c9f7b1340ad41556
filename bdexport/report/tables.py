"""The paper's Tables 1, 2 and 3 (4 for ImageNet) beside what was measured, as rows of text. Pure data.

A cell says ``not measured`` where nothing of ours was given, and ``not in the paper`` where the paper has no figure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bdexport.report import paper
from bdexport.report.points import (
    BLOCKDROP,
    FULL,
    Point,
    Spread,
    comparable,
    in_order,
    method_name,
)

NOT_MEASURED, NOT_PUBLISHED = "not measured", "not in the paper"
TABLE_1_METHODS = ("first-k", "random-k", "distribute-k", BLOCKDROP, FULL)


@dataclass
class Table:
    """Text cells; ``marks`` are footnotes in the order of their first use. The first row names the columns."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def mark(self, note: str) -> str:
        """The sign of a footnote, which is added when it is new."""
        if note not in self.notes:
            self.notes.append(note)
        return f" [{self.notes.index(note) + 1}]"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
            "notes": self.notes,
        }


# ---- Table 1 -------------------------------------------------------------------------------------------------------


def table_1(points: Iterable[Point], dataset: str) -> Table:
    """Learned policies against heuristics, without and with finetuning: the paper's accuracy (%) and K beside ours.

    A method that was measured several times has a row for each.
    """
    columns: tuple[str, ...] = ("network", "method")
    for kind in ("", " (ft)"):
        columns += (f"paper acc{kind}", f"paper K{kind}", f"ours acc{kind}", f"ours K{kind}")
    table = Table("Learned policies and fixed masks: Table 1 of the paper beside ours (ft: finetuned)", columns)
    published = {(row.architecture, row.method): row for row in paper.table_1(dataset)}
    ours = in_order(comparable(points))
    for architecture in _architectures([row[0] for row in published], ours):
        for method in TABLE_1_METHODS:
            mine = [point for point in ours if (point.architecture, point.method) == (architecture, method)]
            _add_method(table, architecture, method, published.get((architecture, method)), mine)
    return table


def _add_method(
    table: Table, architecture: str, method: str, published: paper.Heuristic | None, mine: list[Point]
) -> None:
    if method == FULL:
        without, finetuned = [point for point in mine if not point.finetuned], mine
    else:
        without = [point for point in mine if point.finetuned is False]
        finetuned = [point for point in mine if point.finetuned is not False]
    for index in range(max(1, len(without), len(finetuned))):
        pair = [group[index] if index < len(group) else None for group in (without, finetuned)]
        cells: tuple[str, ...] = (
            (paper.architecture_name(architecture), method_name(method)) if index == 0 else ("", "")
        )
        theirs = (published.without, published.finetuned) if published else (None, None)
        for figures, point in zip(theirs, pair, strict=True):
            if index == 0:
                cells += _published(figures) + (_ours(table, point) if point else (NOT_MEASURED, ""))
            else:
                cells += ("", "") + (_ours(table, point) if point else ("", ""))
        table.rows.append(cells)


def _published(figures: tuple[float, float] | None) -> tuple[str, str]:
    if figures is None:
        return (NOT_PUBLISHED, "")
    return (f"{figures[0]:.1f}", f"{figures[1]:g}")


def _ours(table: Table, point: Point) -> tuple[str, str]:
    blocks = "" if point.blocks is None else blocks_text(point.blocks)
    return (f"{point.accuracy:.2f}{_marks(table, point)}", blocks)


def _marks(table: Table, point: Point) -> str:
    marks = ""
    if point.note:
        marks += table.mark(point.note)
    if point.split not in (None, "test"):
        marks += table.mark(f"{point.split} split, not the test set")
    if point.method != FULL and point.finetuned is None:
        marks += table.mark("the result does not say whether it was finetuned")
    return marks


# ---- Tables 3 and 4 ------------------------------------------------------------------------------------------------


def table_3(points: Iterable[Point], dataset: str) -> Table:
    """FLOPs, block usage, accuracy and saving of the full network and BlockDrop: the paper's rows, then ours."""
    published = paper.table_3(dataset)
    number = published[0].where if published else "Table 3"
    table = Table(
        f"FLOPs, block usage and accuracy: {number} of the paper beside ours",
        ("network", "source", "FLOPs", "blocks used", "accuracy", "FLOPs saved"),
    )
    ours = in_order(point for point in comparable(points) if point.method in (FULL, BLOCKDROP))
    ours = [point for point in ours if point.finetuned is not False]
    for architecture in _architectures([point.architecture for point in published], ours):
        _add_architecture(table, architecture, published, ours)
    return table


def _add_architecture(table: Table, architecture: str, published: list[Point], ours: list[Point]) -> None:
    for group, source in ((published, "paper"), (ours, "ours")):
        rows = [point for point in group if point.architecture == architecture]
        full = next((point for point in rows if point.method == FULL), None)
        for point in rows:
            name = point.label
            if source == "ours":
                name = f"{paper.architecture_name(architecture)} {point.label}{_marks(table, point)}"
            table.rows.append((name, source, *_figures(point, source, full)))
        if not rows:
            missing = NOT_MEASURED if source == "ours" else NOT_PUBLISHED
            table.rows.append((paper.architecture_name(architecture), source, *[missing] * 4))


def _figures(point: Point, source: str, full: Point | None) -> tuple[str, str, str, str]:
    missing = NOT_MEASURED if source == "ours" else NOT_PUBLISHED
    return (
        flops_text(point.flops) if point.flops else missing,
        blocks_text(point.blocks) if point.blocks else missing,
        f"{point.accuracy:.1f} %" if source == "paper" else f"{point.accuracy:.2f} %",
        saving_text(point, full),
    )


def saving_text(point: Point, full: Point | None) -> str:
    """FLOPs saved against the full network of the same source, in percent; a dash for the full network itself."""
    if point.method == FULL:
        return "-"
    if full is None or full.flops is None or point.flops is None or not full.flops.mean:
        return NOT_MEASURED
    return f"{100 * (1 - point.flops.mean / full.flops.mean):.1f} %"


# ---- Table 2 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Mean latency of one image by method in milliseconds, measured by ``bdexport bench`` at batch 1."""

    label: str
    architecture: str
    dataset: str
    where: str  # backend, device, threads
    full_ms: float
    dynamic_ms: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return dict(vars(self))


def table_2(latencies: Iterable[Latency]) -> Table:
    """Latency of one image: the paper's, on its GPU, beside ours. Only the speed-ups can be compared."""
    table = Table(
        "Time per image: Table 2 of the paper beside ours (other hardware: compare the time saved only)",
        ("network", "source", "full network", "dynamic", "time saved"),
    )
    ours = list(latencies)
    for architecture in dict.fromkeys(latency.architecture for latency in ours):
        theirs = paper.table_2(architecture)
        name = paper.architecture_name(architecture)
        if theirs:
            cells = _saved(theirs[FULL], theirs[BLOCKDROP])
            table.rows.append((name, "paper, CIFAR-10, NVIDIA P6000", *cells))
        for latency in ours:
            if latency.architecture == architecture:
                cells = _saved(latency.full_ms, latency.dynamic_ms)
                table.rows.append((f"{name} {latency.label}", f"ours, {latency.where}", *cells))
    return table


def _saved(full_ms: float, dynamic_ms: float) -> tuple[str, str, str]:
    return (f"{full_ms:.3g} ms", f"{dynamic_ms:.3g} ms", f"{100 * (1 - dynamic_ms / full_ms):.1f} %")


# ---- all points ----------------------------------------------------------------------------------------------------


def all_points(numbered: Iterable[tuple[str, Point]]) -> Table:
    """Every point of a data set with its number in the plots."""
    table = Table(
        "All results",
        ("#", "what", "network", "method", "accuracy", "blocks used", "FLOPs", "unique masks", "source", "command"),
    )
    for number, point in numbered:
        missing = NOT_MEASURED if point.source == "measured" else NOT_PUBLISHED
        images = "" if point.images is None else f", {point.images} images"
        source = f"paper, {point.where}" if point.source == "paper" else f"{point.split or 'split not named'}{images}"
        tuned = {True: " (ft)", False: " (not ft)", None: ""}[point.finetuned]
        table.rows.append(
            (
                number,
                f"{point.label}{table.mark(point.note) if point.note else ''}",
                paper.architecture_name(point.architecture),
                f"{method_name(point.method)}{tuned}",
                f"{point.accuracy:.1f} %" if point.source == "paper" else f"{point.accuracy:.2f} %",
                missing if point.blocks is None else f"{blocks_text(point.blocks)} of {point.num_blocks or '?'}",
                missing if point.flops is None else flops_text(point.flops),
                missing if point.unique_masks is None else str(point.unique_masks),
                source,
                point.command or (f"from {point.where}" if point.source == "measured" and point.where else ""),
            )
        )
    return table


def blocks_text(blocks: Spread) -> str:
    """``6.9 ± 1.6``; a fixed number without a deviation."""
    return f"{blocks.mean:.4g}" if not blocks.std else f"{blocks.mean:.1f} ± {blocks.std:.1f}"


def flops_text(flops: Spread) -> str:
    """``8.66e7 ± 1.4e7``."""
    return _power(flops.mean, 2) if not flops.std else f"{_power(flops.mean, 2)} ± {_power(flops.std, 1)}"


def _power(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _architectures(published: Iterable[str | None], ours: Iterable[Point]) -> list[str]:
    """The paper's first, then the others that were measured."""
    names = [*published, *(point.architecture for point in ours)]
    return list(dict.fromkeys(name for name in names if name is not None))
