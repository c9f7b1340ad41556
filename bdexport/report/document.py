"""Report -> what stands on the page, in order: headings, text, tables and figures. No HTML, nothing drawn yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bdexport.config import ReportConfig
from bdexport.report import paper, plots, sheets
from bdexport.report.collect import Report, Sheet
from bdexport.report.curves import Curves
from bdexport.report.frontier import Axis, Frontier, frontier
from bdexport.report.tables import Table
from bdexport.report.usage import Usage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAME = 100  # characters of a plot's file name, far below what file systems allow
TITLE = "BlockDrop: results of training"


@dataclass(frozen=True)
class Heading:
    """A section."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; ``code`` is set as a command."""

    text: str
    code: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """A figure: ``name`` without suffix is its file in ``plots/``; ``make`` draws it."""

    name: str
    alt: str
    caption: str
    make: Callable[[], Figure]


Element = Heading | Text | Items | Table | Drawing


def document(report: Report, config: ReportConfig) -> list[Element]:
    """The page from top to bottom."""
    taken: set[str] = set()
    elements: list[Element] = [Text("Made by:"), Text(report.command, code=True)]
    elements += _remarks(report)
    for name in report.datasets():
        elements += _results(report, name, config, taken)
    if report.benchmarks:
        elements += [Heading("On a GPU"), *report.benchmarks]
    if report.curves:
        elements.append(Heading("Training"))
        elements += [_curves(curves, taken) for curves in report.curves]
    if report.usages:
        elements.append(Heading("Block usage"))
        for usage in report.usages:
            elements += _usage(usage, config, taken)
    if report.sheets:
        elements.append(Heading("What policies look at"))
        elements.append(Text("As the paper's Figures 4 and 5; images in the order of the data set, not picked by eye."))
        elements += [_sheet(sheet, taken) for sheet in report.sheets]
    return elements


def drawings(elements: list[Element]) -> list[Drawing]:
    """The figures among them."""
    return [element for element in elements if isinstance(element, Drawing)]


def _remarks(report: Report) -> Iterator[Element]:
    if report.notes or report.paper_remarks:
        yield Heading("To be read with it", 3)
        yield Items((*report.notes, *report.paper_remarks))
    if report.skipped:
        yield Heading("Not shown, and why", 3)
        yield Items(tuple(report.skipped))


def _results(report: Report, dataset: str, config: ReportConfig, taken: set[str]) -> Iterator[Element]:
    yield Heading(f"Accuracy and cost on {dataset}")
    numbered = report.numbered(dataset)
    axes: tuple[tuple[Axis, str], ...] = (("flops", "FLOPs"), ("blocks", "blocks"))
    for axis, word in axes:
        found = frontier(numbered, axis, config.accuracy_span)
        if found.measured:
            caption = f"Accuracy against {word} on {dataset}: {_counted(found)}. Numbers are those of the table below."
            make = partial(plots.frontier_plot, found, dataset)
            yield Drawing(_name(f"frontier-{axis}-{dataset}", taken), caption, caption, make)
    yield from report.tables(dataset)
    yield Text(
        f"FLOPs: 2 x multiply-accumulates of convolutions and linear layers per image. Paper: {paper.citation()}."
        if any(point.source == "paper" for _, point in numbered)
        else "FLOPs: 2 x multiply-accumulates of convolutions and linear layers per image. "
        f"The paper has no results on {dataset}."
    )


def _counted(found: Frontier) -> str:
    splits = sorted({mark.point.split or "split not named" for mark in found.measured})
    text = f"{len(found.measured)} measured ({', '.join(splits)})"
    return f"{text}, {len(found.published)} published by the paper" if found.published else text


def _curves(curves: Curves, taken: set[str]) -> Drawing:
    phases = ", ".join(f"{phase.name} {phase.last - phase.first + 1}" for phase in curves.phases)
    caption = (
        f"Training of {curves.name}: {curves.epochs} epochs ({phases}). "
        "Validation: the split that this run does not learn from."
    )
    return Drawing(_name(f"training-{curves.name}", taken), caption, caption, partial(plots.training_curves, curves))


def _usage(usage: Usage, config: ReportConfig, taken: set[str]) -> Iterator[Element]:
    yield Heading(usage.name, 3)
    where = f"{usage.images} images, {usage.data}"
    covered = "" if usage.covered > 0.9999 else f" The histogram covers the {usage.covered:.1%} whose masks are stored."
    caption = (
        f"{usage.name} keeps {usage.mean:.2f} ± {usage.std:.2f} of {usage.num_blocks} blocks with {usage.unique_masks} "
        f"unique masks ({where}).{covered}"
    )
    yield Drawing(_name(f"usage-{usage.name}", taken), caption, caption, partial(plots.usage_histogram, usage))
    caption = f"Keep-rate per block of {usage.name} ({where}); stages by colour, transitions hatched."
    yield Drawing(_name(f"keep-rate-{usage.name}", taken), caption, caption, partial(plots.keep_rates, usage))
    if usage.class_keep_rate is not None:
        caption = f"Keep-rate per class and block of {usage.name} ({where})."
        if len(usage.class_names) > config.heat_map_classes:
            caption += f" The first {config.heat_map_classes} of {len(usage.class_names)} classes."
        make = partial(plots.class_keep_rates, usage, config.heat_map_classes)
        yield Drawing(_name(f"keep-rate-per-class-{usage.name}", taken), caption, caption, make)
    table = Table(
        f"Most frequent masks of {usage.name}, block 0 first (1: kept)", ("mask", "blocks", "share of images")
    )
    table.rows = [(mask, str(mask.count("1")), f"{share:.1%}") for mask, share in usage.masks]
    yield table


def _sheet(sheet: Sheet, taken: set[str]) -> Drawing:
    if sheet.kind == "policies":
        caption = (
            f"{sheet.name}: per class its most frequent policies and the first images that take each; a filled square "
            "is a kept block."
        )
    else:
        caption = (
            f"{sheet.name}: per class the correctly classified images with the fewest and the most blocks (the number "
            "in the corner; ties: the more confident prediction)."
        )
    name = _name(f"sheet-{sheet.kind}-{sheet.name}", taken)
    return Drawing(name, caption, caption, partial(sheets.contact_sheet, sheet))


def _name(text: str, taken: set[str]) -> str:
    """A file name that no other figure has."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.").lower()[:MAX_NAME] or "figure"
    name, count = plain, 1
    while name in taken:
        count += 1
        name = f"{plain}-{count}"
    taken.add(name)
    return name
