"""``bdexport export``: the parts of a checkpoint as ONNX graphs, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, progress, table_console, write_json_result
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
from bdexport.cli.options import writable
from bdexport.cli.stages import size_text, stages_of

if TYPE_CHECKING:
    from bdexport.checkpoint import Checkpoint


def export(
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, PyTorch file or zoo:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder for the graphs, one file per part.")],
    parts: Annotated[
        str | None, typer.Option(help="Only these, e.g. policy,stem,block_00,head,full. Default: all.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    arch: Arch = None,
    shortcut: ShortcutKind = None,
    dropped_transition: DroppedRule = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize_short: ResizeShort = None,
    class_names: ClassNames = None,
    json: Annotated[
        str | None, typer.Option(help="Write the table to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Write every part as an ONNX graph of its own: batch norm folded, batch size free, weights inside."""
    from bdexport.checkpoint import load_checkpoint, loading_record
    from bdexport.files import check_new_folder

    check_new_folder(out, overwrite)  # before minutes of exporting, not after
    loading = Loading(arch, shortcut, dropped_transition, mean, std, size, resize_short, class_names)
    found = load_checkpoint(checkpoint, **loading.arguments())
    say_assumed(found, checkpoint)
    wanted = None if parts is None else [name.strip() for name in parts.split(",") if name.strip()]
    rows = _write(found, out, wanted, overwrite)
    result = {
        "schema": "bdexport.export/1",
        "checkpoint": checkpoint,
        "out": out,
        "architecture": found.network.name,
        "loading": loading_record(found),
        "parts": rows,
    }
    _print_table(result, json)
    if json is not None:
        write_json_result(json, result)


def _write(found: Checkpoint, out: Path, wanted: list[str] | None, overwrite: bool) -> list[dict[str, Any]]:
    import onnx

    from bdexport.checkpoint import build_model
    from bdexport.export import export_parts
    from bdexport.export_gated import export_gated
    from bdexport.files import making_folder
    from bdexport.models.flops import count_flops
    from bdexport.parts import POLICY

    # A plain network has every part but the policy; those may be had without training one.
    model = build_model(found, with_policy=found.gates is None and (wanted is None or POLICY in wanted))
    write = export_parts if found.gates is None else export_gated
    flops = count_flops(model, found.preprocess.size).parts()
    with progress() as bar, making_folder(out, overwrite) as staging:
        files = write(model, found.preprocess, staging, wanted, progress=stages_of(bar))
        return [
            {
                "part": part,
                "file": file.name,
                "bytes": file.stat().st_size,
                "nodes": len(onnx.load(file).graph.node),
                "flops": flops[part],
            }
            for part, file in files.items()
        ]


def _print_table(result: dict[str, Any], json: str | None) -> None:
    table = FittedTable(title=f"{result['architecture']}: {len(result['parts'])} parts in {result['out']}")
    table.add_column("part")
    for name in ("size", "nodes", "FLOPs"):
        table.add_column(name, justify="right")
    for row in result["parts"]:
        table.add_row(row["part"], size_text(row["bytes"]), str(row["nodes"]), f"{row['flops']:.3e}")
    table_console(json).print(table)
