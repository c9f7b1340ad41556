"""``bdexport report``: runs and results as tables, plots and one page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, err_console, progress, table_console, to_plain, write_json_result
from bdexport.cli.loading import (
    ClassNames,
    DroppedRule,
    Loading,
    Mean,
    ResizeShort,
    ShortcutKind,
    Size,
    Std,
)
from bdexport.cli.options import MaxPixels, refuse, writable
from bdexport.cli.stages import stages_of
from bdexport.config import ReportConfig

if TYPE_CHECKING:
    from bdexport.cli.console import StageProgress
    from bdexport.report.collect import Data, Report
    from bdexport.report.measure import Tracked

DEFAULT = ReportConfig()


def report(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(help="RUN folders, checkpoints (or zoo:NAME), JSON of 'evaluate' or 'bench', files of points."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, its Markdown twin, the data and the plots.")],
    dataset: Annotated[
        str | None, typer.Option(help="Measure the checkpoints: cifar10, cifar100, folder or digits.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits needs none).")] = None,
    max_pixels: MaxPixels = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = DEFAULT.split,
    images: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = DEFAULT.batch,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    shortcut: ShortcutKind = None,
    dropped_transition: DroppedRule = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize_short: ResizeShort = None,
    class_names: ClassNames = None,
    json: Annotated[
        str | None, typer.Option(help="Also write the data to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Training curves, accuracy against FLOPs beside the paper's, block usage, contact sheets: HTML, PNG and SVG.

    What the checkpoint does not say itself (--mean, --shortcut ..): the options are about foreign files among the
    sources; checkpoints in bdexport's own form say everything themselves.
    """
    from dataclasses import replace

    from bdexport.files import check_new_folder, usable_path
    from bdexport.report.collect import collect
    from bdexport.report.sources import read_sources
    from bdexport.report.write import write_report

    _need_matplotlib()
    if dataset is None:
        needing = ("data", "split", "images", "batch", "max_pixels")
        refuse(context, needing, "without a data set to measure on", "pass --dataset too, or leave it out")
    check_new_folder(out, overwrite)  # before minutes of measuring, not after
    config = replace(DEFAULT, split=split, batch=batch)
    found = read_sources([usable_path(path) for path in sources])
    loading = Loading(None, shortcut, dropped_transition, mean, std, size, resize_short, class_names)
    models = loading.load_several([source.path for source in found.trained if source.has_model])
    chosen = None if dataset is None else _data(dataset, data, split, images, loading.words(), max_pixels)
    words = [*(chosen.words if chosen else ()), *loading.words()]
    command = shlex.join(["bdexport", "report", *map(str, sources), *words, "--out", "DIR"])
    with progress() as bar:
        result = collect(found, chosen, config, command, _tracked(bar), models)
        plain: dict[str, Any] = to_plain(result.to_json())
        files = write_report(result, plain, out, config, overwrite, stages_of(bar))
    _print_summary(result, files, json)
    if json is not None:
        write_json_result(json, plain)


def _need_matplotlib() -> None:
    """Fail now, not after the measuring; the missing module is explained where every other one is."""
    import matplotlib  # noqa: F401


def _data(
    dataset: str,
    data: Path | None,
    split: str,
    images: int | None,
    loading: tuple[str, ...],
    max_pixels: int | None,
) -> Data:
    from bdexport.dataset import load_dataset
    from bdexport.report.collect import Data

    words = ["--dataset", dataset, *(["--data", str(data)] if data is not None else []), "--split", split]
    words += [] if images is None else ["--images", str(images)]
    words += [] if max_pixels is None else ["--max-pixels", str(max_pixels)]
    return Data(load_dataset(dataset, data, split, limit=images, max_pixels=max_pixels), tuple(words), loading)


def _tracked(bar: StageProgress) -> Tracked:
    def track(title: str, batches: Any, total: int) -> Iterator[Any]:
        return iter(bar.track(batches, total=total, description=title))

    return track


def _print_summary(result: Report, files: list[Path], json: str | None) -> None:
    out = table_console(json)
    for dataset in result.datasets():
        measured = [(number, point) for number, point in result.numbered(dataset) if point.source == "measured"]
        if not measured:
            continue
        from bdexport.report.tables import all_points

        rows = all_points(measured)
        shown = [index for index, column in enumerate(rows.columns) if column not in ("command", "network")]
        table = FittedTable(*(rows.columns[index] for index in shown), title=f"results on {dataset}")
        for row in rows.rows:
            table.add_row(*(row[index] for index in shown))
        out.print(table)
    for text in result.notes:
        err_console.print(f"note: {text}")
    for text in result.skipped:
        err_console.print(f"not shown: {text}")
    plots = sum(file.suffix == ".svg" for file in files)
    out.print(f"{files[0]} ({plots} plots beside it, as SVG and PNG)", soft_wrap=True)
