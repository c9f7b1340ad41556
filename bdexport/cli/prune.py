"""``bdexport prune``: the weakest filters of every block removed (PFEC), as a checkpoint to finetune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, table_console, write_json_result
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

if TYPE_CHECKING:
    from bdexport.architecture import ResNetSpec
    from bdexport.checkpoint import Checkpoint


def prune(
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, PyTorch file or zoo:NAME.")],
    out: Annotated[Path, typer.Option(help="The pruned checkpoint, a .safetensors file.")],
    ratio: Annotated[float | None, typer.Option(help="Share of inner filters to remove in every block.")] = None,
    per_stage: Annotated[str | None, typer.Option(help="Instead: one share for each stage, e.g. 0.6,0.3,0.1.")] = None,
    skip_blocks: Annotated[
        str | None, typer.Option(help="Blocks to leave whole, counted from 0, e.g. 7-9,16,26.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
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
    """Remove the filters of smallest L1 norm inside each block (PFEC); a policy stays. Finetune the result."""
    from bdexport.checkpoint import check_suffix, load_checkpoint, loading_record, save_checkpoint
    from bdexport.files import check_writable, refuse_existing
    from bdexport.prune import prune_checkpoint

    refuse_existing(out, overwrite)
    check_suffix(out)
    check_writable(out)
    loading = Loading(arch, shortcut, dropped_transition, mean, std, size, resize_short, class_names)
    before = load_checkpoint(checkpoint, **loading.arguments())
    say_assumed(before, checkpoint)
    ratios = _ratios(ratio, per_stage, len(before.network.stages))
    after = prune_checkpoint(before, ratios, _blocks(skip_blocks, before.network.num_blocks), checkpoint.name)
    save_checkpoint(out, after)
    result = {
        "schema": "bdexport.prune/1",
        "checkpoint": checkpoint,
        "out": out,
        "architecture": after.network.name,
        "loading": loading_record(before),
        "pruned": after.training["pruned"],
        "has_policy": after.policy is not None,
        "before": _size(before),
        "after": _size(after),
    }
    if json is not None:  # before the tables, whose reader may have gone
        write_json_result(json, result)
    _print(result, before.network, after.network, json)


def _ratios(ratio: float | None, per_stage: str | None, stages: int) -> list[float]:
    from bdexport.errors import UsageError

    if (ratio is None) == (per_stage is None):
        got, remedy = (
            ("both", "leave one of them out") if ratio is not None else ("neither", "pass one, e.g. --ratio 0.3")
        )
        raise UsageError("how much to prune: --ratio or --per-stage", got=got, remedy=remedy)
    if ratio is not None:
        return [ratio] * stages
    assert per_stage is not None
    try:
        return [float(word) for word in per_stage.split(",")]
    except ValueError:
        raise UsageError("--per-stage", got=repr(per_stage), expected="numbers with commas, e.g. 0.6,0.3,0.1") from None


def _blocks(text: str | None, num_blocks: int) -> set[int]:
    """``7-9,16`` -> {7, 8, 9, 16}. Raises UsageError on anything else, and on blocks that are not there."""
    from bdexport.errors import UsageError

    found: set[int] = set()
    for word in [] if text is None else text.split(","):
        first, dash, last = word.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            low, high = 0, -1
        if not 0 <= low <= high < num_blocks:
            expected = f"block numbers in 0..{num_blocks - 1} or ranges of them, e.g. 7-9,16"
            raise UsageError("--skip-blocks", got=repr(word), expected=expected)
        found |= set(range(low, high + 1))
    return found


def _size(found: Checkpoint) -> dict[str, Any]:
    """FLOPs of the undropped network and the number of its weights."""
    from bdexport.checkpoint import build_model
    from bdexport.models.flops import count_flops

    model = build_model(found, with_policy=False)
    weights = sum(parameter.numel() for parameter in model.network.parameters())
    return {"flops": count_flops(model, found.preprocess.size).full, "weights": weights}


def _print(result: dict[str, Any], before: ResNetSpec, after: ResNetSpec, json: str | None) -> None:
    table = FittedTable(title=f"{result['architecture']}: filters inside the blocks, {result['out']}")
    for name in ("stage", "ratio", "block by block"):
        table.add_column(name)
    pairs = [f"{old.channels}>{new.channels}" for old, new in zip(before.blocks(), after.blocks(), strict=True)]
    for stage, (count, ratio) in enumerate(zip(before.stages, result["pruned"]["ratios"], strict=True), start=1):
        table.add_row(str(stage), f"{ratio:g}", " ".join(pairs[:count]))
        pairs = pairs[count:]
    shown = table_console(json)
    shown.print(table)
    for name in ("flops", "weights"):
        old, new = result["before"][name], result["after"][name]
        shown.print(f"{name}: {old:.4g} -> {new:.4g} ({100 * (new / old - 1):+.1f} %), undropped, without the policy")
    shown.print(f"next: bdexport train --base {result['out']} --teacher {result['checkpoint']} ..")
