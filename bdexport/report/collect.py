"""Sources and, where there is one, a data set -> everything that a report shows, as data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.base_figures import BaseFigures, known_base, was_trained
from bdexport.config import ReportConfig
from bdexport.dataset import Dataset
from bdexport.errors import DatasetError
from bdexport.json_text import MalformedError, shown
from bdexport.report import paper, tables
from bdexport.report.curves import Curves, curves_of
from bdexport.report.fields import count, figure, optional, text
from bdexport.report.points import (
    FIXED_MASKS,
    Point,
    base_point,
    checkpoint_key,
    comparable,
    datasets,
    full_point,
    in_order,
    outcome_point,
    with_training,
    without_repeats,
)
from bdexport.report.samples import Strip, easiest_and_hardest, shared_policies
from bdexport.report.sources import Sources, Trained, mask_title, trained_as
from bdexport.report.usage import Usage, usage_of_masks, usage_of_statistics

if TYPE_CHECKING:
    from bdexport.checkpoint import Checkpoint
    from bdexport.report.measure import Measured, Tracked


@dataclass(frozen=True)
class Data:
    """The images to measure on, and the words of a command line that name them.

    ``loading``: the words that say of a foreign checkpoint what its file does not.
    """

    dataset: Dataset
    words: tuple[str, ...]
    loading: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Sheet:
    """A contact sheet: ``pixels[i]`` uint8 (n, H, W, 3) are the images of ``strips[i]``."""

    name: str
    kind: str  # "policies" or "difficulty"
    strips: tuple[Strip, ...]
    pixels: tuple[NDArray[np.uint8], ...]


@dataclass
class Report:
    """What is shown. ``skipped``: what is not, and why."""

    command: str
    points: list[Point] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    latencies: list[tables.Latency] = field(default_factory=list)
    benchmarks: list[tables.Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    paper_remarks: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def numbered(self, dataset: str) -> list[tuple[str, Point]]:
        """The points of a data set, measured ones as 1, 2, .. and the paper's as P1, P2, .."""
        measured = in_order(p for p in self.points if p.source == "measured" and p.dataset == dataset)
        given = [p for p in self.points if p.source == "paper" and p.dataset == dataset]
        published = in_order([*paper.paper_points(dataset), *given])
        return [(str(index), point) for index, point in enumerate(measured, start=1)] + [
            (f"P{index}", point) for index, point in enumerate(published, start=1)
        ]

    def tables(self, dataset: str) -> list[tables.Table]:
        """All results, then the paper's tables beside ours; without those for which nothing was measured."""
        mine = [point for point in self.points if point.dataset == dataset]
        latencies = [latency for latency in self.latencies if latency.dataset == dataset]
        made = []
        if mine:
            made = [tables.all_points(self.numbered(dataset)), tables.table_1(mine, dataset)]
        if latencies:
            made.append(tables.table_2(latencies))
        if mine:
            made.append(tables.table_3(mine, dataset))
        return [table for table in made if table.rows]

    def datasets(self) -> list[str]:
        """Every data set that something was measured on."""
        return list(dict.fromkeys([*datasets(self.points), *(latency.dataset for latency in self.latencies)]))

    def to_json(self) -> dict[str, Any]:
        """``bdexport.report/1``: everything but the pixels."""
        return {
            "schema": "bdexport.report/1",
            "command": self.command,
            "points": [point.to_json() for point in self.points],
            "tables": {name: [table.to_json() for table in self.tables(name)] for name in self.datasets()},
            "curves": [curves.to_json() for curves in self.curves],
            "usage": [usage.to_json() for usage in self.usages],
            "sheets": [
                {"name": sheet.name, "kind": sheet.kind, "strips": [strip.to_json() for strip in sheet.strips]}
                for sheet in self.sheets
            ],
            "latencies": [latency.to_json() for latency in self.latencies],
            "benchmarks": [table.to_json() for table in self.benchmarks],
            "notes": self.notes,
            "paper_remarks": self.paper_remarks,
            "skipped": self.skipped,
        }


def collect(
    sources: Sources,
    data: Data | None,
    config: ReportConfig,
    command: str,
    tracked: Tracked,
    loaded: Mapping[Path, Checkpoint] | None = None,
) -> Report:
    """Measure what can be measured and read the rest. Raises CheckpointError, DatasetError (no checkpoint fits).

    ``loaded``: the sources' checkpoints by their paths, where more is known of them than the files say.
    """
    report = Report(command, latencies=list(sources.latencies), skipped=list(sources.skipped))
    report.benchmarks = [found.table for found in sources.benchmarks if found.table is not None]
    trained: dict[str, tuple[str, bool | None]] = {}
    refusals: list[DatasetError] = []
    models = [source for source in sources.trained if source.has_model]
    for source in sources.trained:
        _add_run(report, source)
    if models:
        from bdexport.report import measure  # with torch, which JSON results alone do not need
    for source in models:
        found = measure.load(source.path) if loaded is None else loaded[source.path]
        report.notes += [f"{source.name}: {note}" for note in found.notes]
        kind = trained_as(_settings(source, found))
        trained[checkpoint_key(source.path.as_posix())] = kind
        try:
            measured = None
            if data is not None:
                measured = measure.measure(found, data.dataset, config.batch, source.name, tracked)
        except DatasetError as error:
            refusals.append(error)
            report.skipped.append(f"{source.name}: not measured on {data.dataset.name if data else ''}: {error}")
        if measured is not None and data is not None:
            _add_measured(report, source, found, kind, measured, data, config)
            _add_base(report, source, found, measure.base(source.path, found, data.dataset, config.batch, tracked))
        else:
            try:
                _add_stored(report, source, found, kind, measure.flops_of(found).full)
            except MalformedError as error:
                report.skipped.append(f"{source.name}: no results: its training record is incomplete ({error})")
    if refusals and len(refusals) == len(models):
        raise refusals[0]
    report.points = with_training(without_repeats([*report.points, *sources.points]), trained)
    _remark(report, data, bool(models))
    return report


def _settings(source: Trained, found: Checkpoint) -> dict[str, Any]:
    record = source.run.description if source.run is not None else found.training
    settings = record.get("settings")
    return settings if isinstance(settings, dict) else {}


def _add_run(report: Report, source: Trained) -> None:
    if source.run is None:
        report.skipped.append(f"{source.name}: no training curves: a checkpoint without its run folder")
        return
    if source.run.rows:
        report.curves.append(curves_of(source.name, source.run.rows))
    else:
        report.skipped.append(f"{source.name}: no training curves: no epoch is finished")
    base = source.run.description.get("base")
    if base is not None:
        report.notes.append(
            f"{source.name} started from a base network ({base if isinstance(base, str) else shown(base)}). Its "
            "validation split was kept from this run, but the base may have learned from it (public CIFAR checkpoints "
            "were trained on the whole training set): its validation accuracy may be too high; compare on the test set."
        )
    if not source.run.finished:
        report.skipped.append(f"{source.name}: no results: the run is not finished, so it has no model yet")


def _common(source: Trained, found: Checkpoint) -> dict[str, Any]:
    return {
        "source": "measured",
        "architecture": found.network.name,
        "num_blocks": found.network.num_blocks,
        "checkpoint": checkpoint_key(source.path.as_posix()),
        "where": source.path.as_posix(),
    }


def _label(source: Trained, found: Checkpoint) -> str:
    """As ``evaluate`` names the result: the mask belongs to the name where it is fixed."""
    title = mask_title(found.training)
    return source.name if title is None else f"{source.name}: {title}"


def _add_measured(
    report: Report,
    source: Trained,
    found: Checkpoint,
    kind: tuple[str, bool | None],
    measured: Measured,
    data: Data,
    config: ReportConfig,
) -> None:
    dataset = data.dataset
    common = _common(source, found) | {"dataset": dataset.name, "split": dataset.split, "images": len(dataset)}
    words = [*data.words, *(data.loading if found.form != "bdexport" else ())]
    common["command"] = shlex.join(["bdexport", "evaluate", source.path.as_posix(), *words])
    tuned = (kind[1] or None) if measured.dropped is not None else None  # False: the network is the base's own
    report.points.append(
        full_point(f"{source.name}: full", measured.full.accuracy, measured.flops.full, finetuned=tuned, **common)
    )
    dropped = measured.dropped
    if dropped is None:
        return
    outcome = dropped.to_json(measured.flops, with_policy=measured.with_policy)
    label = _label(source, found)
    report.points.append(outcome_point(label, kind[0], kind[1], outcome, **common))
    where = f"{dataset.name} {dataset.split} split"
    report.usages.append(
        usage_of_masks(source.name, where, found.network, dropped.masks, dataset.labels, dataset.class_names)
    )
    if not measured.with_policy:
        report.skipped.append(f"{source.name}: no contact sheets: its masks do not depend on the image, by design")
        return
    policies = shared_policies(
        dropped.masks,
        dataset.labels,
        dataset.class_names,
        classes=config.sheet_classes,
        policies=config.sheet_policies,
        images=config.sheet_images,
    )
    difficulty = easiest_and_hardest(
        dropped.masks,
        dataset.labels,
        dropped.correct,
        measured.confidence,
        dataset.class_names,
        classes=config.sheet_classes,
        images=config.sheet_images,
    )
    for name, strips in (("policies", policies), ("difficulty", difficulty)):
        if strips:
            pixels = tuple(dataset.fitted(found.preprocess, list(strip.rows)) for strip in strips)
            report.sheets.append(Sheet(source.name, name, tuple(strips), pixels))


def _add_base(report: Report, source: Trained, found: Checkpoint, base: BaseFigures | None) -> None:
    """What the run started from, on the images that its results are of; a remark where that is not known."""
    if base is not None and base.here:
        common = _common(source, found) | {"dataset": base.dataset, "split": base.split, "images": base.images}
        report.points.append(base_point(source.name, base.to_json(), **common))
    elif base is not None:
        report.notes.append(f"{source.name}: {base.sentence()}")
    elif was_trained(found.training):
        report.notes.append(
            f"{source.name}: its base's accuracy is not on record: what training cost shows only beside it"
        )


def _add_stored(
    report: Report, source: Trained, found: Checkpoint, kind: tuple[str, bool | None], full_flops: int
) -> None:
    """What the checkpoint's own training record says of its validation split."""
    validation, dataset = found.training.get("validation"), found.training.get("dataset")
    if not isinstance(validation, dict) or not isinstance(dataset, dict):
        report.skipped.append(f"{source.name}: no results: nothing is stored in it and no data set was given")
        return
    common = _common(source, found) | {"dataset": text(dataset, "name"), "split": "validation"}
    common["images"] = count(dataset, "validation")
    _add_base(
        report, source, found, known_base(found.training, None, common["dataset"], "validation", common["images"])
    )
    fixed = optional(validation, "fixed", dict) or {}
    outcome = optional(validation, "policy", dict) or next(iter(fixed.values()), None)
    tuned = (kind[1] or None) if outcome else None
    full_accuracy = figure(validation, "full_accuracy", high=100)
    report.points.append(full_point(f"{source.name}: full", full_accuracy, full_flops, finetuned=tuned, **common))
    if outcome:
        report.points.append(outcome_point(_label(source, found), kind[0], kind[1], outcome, **common))
    usage = usage_of_statistics(source.name, found.network, found.training.get("policy_statistics"))
    if usage is not None:
        report.usages.append(usage)


def _remark(report: Report, data: Data | None, has_models: bool) -> None:
    """What a reader must know before comparing."""
    if data is None:
        remedy = "pass --dataset D --data DIR" if has_models else "name a RUN folder or a checkpoint, and the data set"
        report.skipped.append(f"contact sheets and keep-rates per class: no images were given; {remedy}")
    elif not has_models:
        report.skipped.append(f"{data.dataset.name}: nothing was measured on it: no checkpoint was named")
    for usage in report.usages:
        by_design = any(
            p.method in (*FIXED_MASKS, "act", "sact") and p.label.startswith(f"{usage.name}: ") for p in report.points
        )
        if usage.unique_masks == 1 and not by_design:
            report.notes.append(
                f"{usage.name}: the policy gives every image the same mask: a pruned network, not BlockDrop"
            )
    for name in datasets(report.points):
        mine = [point for point in report.points if point.dataset == name]
        left_out = len([p for p in mine if p.source == "measured"]) - len(comparable(mine))
        if left_out:
            report.notes.append(
                f"{name}: {left_out} results of other splits than the test set stand in the list of all results only, "
                "not in the plots and the paper's tables"
            )
        report.paper_remarks += paper.remarks(name, with_latency=bool(report.latencies))
