"""``bdexport calibrate``: ranges of activations for INT8 and FP8, along the paths that the policy takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, err_console, progress, table_console, write_json_result
from bdexport.cli.loading import (
    Arch,
    ClassNames,
    DroppedRule,
    Loading,
    Mean,
    ResizeShort,
    ShortcutKind,
    Size,
    Std,
    say_assumed,
)
from bdexport.cli.options import MaxPixels, check_json_target, refuse, writable
from bdexport.cli.stages import stages_of
from bdexport.config import CalibrationConfig

if TYPE_CHECKING:
    from rich.table import Table

    from bdexport.calibrate import Scales
    from bdexport.calibration_list import CalibrationList
    from bdexport.checkpoint import Checkpoint

DEFAULTS = CalibrationConfig()


def calibrate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, PyTorch file or zoo:NAME.")],
    dataset: Annotated[
        str | None, typer.Option(help="cifar10, cifar100, folder, digits, cifar10-samples. Not needed with --list.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits and samples need none).")] = None,
    max_pixels: MaxPixels = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images on the list, drawn evenly over classes.")
    ] = DEFAULTS.images,
    split: Annotated[str, typer.Option(help="train, validation or test; the samples have test only.")] = DEFAULTS.split,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Use the images of this list, e.g. calibration/cifar10.json.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the list is written. Default: calibration/DATASET.json.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the scales are kept.")] = Path(DEFAULTS.folder),
    arch: Arch = None,
    shortcut: ShortcutKind = None,
    dropped_transition: DroppedRule = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize_short: ResizeShort = None,
    class_names: ClassNames = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Gather scales (INT8, FP8) for every part, write the list of images and keep the scales for `build`."""
    from bdexport.calibrate import CalibrationRequest
    from bdexport.calibration_list import read_list, write_list
    from bdexport.checkpoint import load_checkpoint, loading_record
    from bdexport.dataset import check_folder
    from bdexport.errors import UsageError
    from bdexport.files import check_writable

    loading = Loading(arch, shortcut, dropped_transition, mean, std, size, resize_short, class_names)
    if dataset is None and list_file is None:
        raise UsageError("nothing to calibrate on", remedy="pass --dataset D --data DIR, or --list FILE --data DIR")
    if list_file is not None:
        why, remedy = "with --list, which names its data set and images", "leave it out, or --list to draw new images"
        refuse(context, ("dataset", "out", "images", "split"), why, remedy)
    check_writable(folder / "scales")
    if list_file is None:
        check_json_target(out or folder / f"{dataset}.json", "--out")
    # Before the parts are exported.
    check_folder(read_list(list_file).dataset if list_file is not None else str(dataset), data)
    config = CalibrationConfig(images, split, DEFAULTS.batch, str(folder))
    request = CalibrationRequest(config, dataset, data, list_file, max_pixels)
    found = load_checkpoint(checkpoint, **loading.arguments())
    say_assumed(found, checkpoint)
    scales, chosen = _gather(found, request)
    assert chosen is not None
    written = list_file
    if written is None:
        written = out or folder / f"{chosen.dataset}.json"
        write_list(written, chosen)
    result = _result(checkpoint, scales, chosen, written) | {"loading": loading_record(found)}
    if json is not None:  # before the tables, whose reader may have gone
        write_json_result(json, result)
    for note in scales.notes:
        err_console.print(note, soft_wrap=True)
    table_console(json).print(_table(result))


def _gather(checkpoint: Checkpoint, request: Any) -> tuple[Scales, CalibrationList | None]:
    from bdexport.calibrate import scales_for
    from bdexport.checkpoint import build_model
    from bdexport.export import export_parts
    from bdexport.files import scratch_folder

    model = build_model(checkpoint)
    with progress() as bar, scratch_folder(Path(request.config.folder, "parts")) as folder:
        report = stages_of(bar)
        graphs = export_parts(model, checkpoint.preprocess, folder, progress=report)
        names = checkpoint.class_names
        return scales_for(model, graphs, checkpoint.preprocess, request, class_names=names, progress=report)


def _result(checkpoint: Path, scales: Scales, chosen: CalibrationList, written: Path) -> dict[str, Any]:
    return {
        "schema": "bdexport.calibrate/1",
        "checkpoint": checkpoint,
        "list": written,
        "dataset": {"name": chosen.dataset, "split": chosen.split},
        "images": len(chosen),
        "list_sha256": chosen.sha256,
        "parts": [
            {"part": part, "images": count, "layers": len(scales.ranges[part]), "largest": _largest(scales, part)}
            for part, count in scales.images.items()
        ],
        "notes": scales.notes,
    }


def _largest(scales: Scales, part: str) -> float | None:
    ends = [abs(end) for found in scales.ranges[part].values() for end in found]
    return max(ends, default=None)


def _table(result: dict[str, Any]) -> Table:
    where = f"{result['images']} images of {result['dataset']['name']} {result['dataset']['split']}"
    table = FittedTable("part", title=f"scales from {where}; list: {result['list']}")
    for name in ("images that run it", "tensors", "largest value"):
        table.add_column(name, justify="right")
    for entry in result["parts"]:
        largest = "-" if entry["largest"] is None else f"{entry['largest']:.2f}"
        table.add_row(entry["part"], str(entry["images"]), str(entry["layers"]), largest)
    return table
