"""``bdexport evaluate``: accuracy, block usage and FLOPs of a checkpoint, dropped and undropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bdexport.cli.console import progress, table_console, write_json_result

if TYPE_CHECKING:
    from bdexport.architecture import Shortcut


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, or a PyTorch file.")],
    dataset: Annotated[str, typer.Option(help="cifar10, cifar100, folder or digits.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits needs none).")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    images: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    fixed: Annotated[
        list[str] | None,
        typer.Option(help="Also a fixed mask: first-k, random-k, distribute-k or 0s and 1s; repeatable."),
    ] = None,
    kept: Annotated[
        int | None, typer.Option(help="K of the fixed masks; default: the policy's mean, rounded up.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture, where it cannot be recognised.")] = None,
    shortcut: Annotated[str | None, typer.Option(help="avgpool or option_a, where the file does not say.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of random-k.")] = 0,
    json: Annotated[str | None, typer.Option(help="Write the result to this file ('-': stdout).")] = None,
) -> None:
    """Accuracy, block usage mean +- std, FLOPs per image (2 x MAC, conv and linear, policy included), unique masks."""
    import torch

    from bdexport.checkpoint import build_model, load_checkpoint
    from bdexport.dataset import check_classes, load_dataset
    from bdexport.evaluate import evaluate_model
    from bdexport.train.data import DeviceImages

    found = load_checkpoint(
        checkpoint,
        arch=arch,
        shortcut=cast("Shortcut | None", shortcut),  # load_checkpoint refuses any other word
    )
    chosen = load_dataset(dataset, data, split, limit=images)
    # Only our own form knows its classes; the names of a foreign checkpoint are a guess, and no reason to refuse data.
    check_classes(chosen, found.network.num_classes, found.class_names if found.form == "bdexport" else ())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(found, with_policy=False).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = DeviceImages(chosen.arrays(found.preprocess), chosen.labels, found.preprocess, device)
    trained_for = found.training.get(
        "fixed_mask"
    )  # of --method fixed: what it was finetuned under, unless asked otherwise
    with progress() as bar:
        result = evaluate_model(
            model,
            lambda title: bar.track(source.batches(batch), total=-(-len(source) // batch), description=title),
            found.preprocess.size,
            has_policy=found.policy is not None,
            fixed=fixed or ([] if trained_for is None else [trained_for["mask"]]),
            kept=kept if kept is not None or trained_for is None else trained_for["kept"],
            seed=seed,
        )
    result = {
        "schema": "bdexport.evaluate/1",
        "checkpoint": checkpoint,
        "architecture": found.network.name,
        "dataset": {"name": chosen.name, "split": chosen.split, "images": len(chosen)},
        "num_blocks": found.network.num_blocks,
    } | result
    _print_table(result, json)
    if json is not None:
        write_json_result(json, result)


def _print_table(result: dict[str, Any], json: str | None) -> None:
    from rich.table import Table

    where = result["dataset"]
    network = f"{result['architecture']}, {result['num_blocks']} blocks"
    title = f"{network}, {where['name']} {where['split']}, {where['images']} images"
    table = Table("", "accuracy", "blocks used", "FLOPs", "unique masks", title=title)
    full = result["full"]
    table.add_row("full", f"{full['accuracy']:.2f} %", f"{result['num_blocks']:.1f}", f"{full['flops']:.3e}", "1")
    rows = [("policy", result["policy"])] if "policy" in result else []
    rows += [(result["gates"]["kind"], result["gates"])] if "gates" in result else []
    for name, row in [*rows, *result.get("fixed", {}).items()]:
        used, flops = row["blocks_used"], row["flops"]
        table.add_row(
            name,
            f"{row['accuracy']:.2f} %",
            f"{used['mean']:.1f} +- {used['std']:.1f}",
            f"{flops['mean']:.3e} +- {flops['std']:.1e}",
            str(row["unique_masks"]),
        )
    out = table_console(json)
    out.print(table)
    if not rows:
        out.print("no policy in this checkpoint: 'bdexport train --base CHECKPOINT' gives it one")
