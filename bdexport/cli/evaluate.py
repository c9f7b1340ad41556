"""``bdexport evaluate``: accuracy, block usage and FLOPs of a checkpoint, dropped and undropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, progress, table_console, write_json_result
from bdexport.cli.loading import (
    Arch,
    CheckAgainst,
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
from bdexport.cli.options import MaxPixels, refuse, writable
from bdexport.cli.stages import show_skipped

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from bdexport.base_figures import BaseFigures
    from bdexport.checkpoint import Checkpoint
    from bdexport.dataset import Dataset
    from bdexport.models.pair import BlockDropNet


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, PyTorch file or zoo:NAME.")],
    dataset: Annotated[str, typer.Option(help="cifar10, cifar100, folder, digits, cifar10-samples.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits and samples need none).")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    images: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out image files that cannot be decoded, and list them.")
    ] = False,
    max_pixels: MaxPixels = None,
    fixed: Annotated[
        list[str] | None,
        typer.Option(help="Also a fixed mask: first-k, random-k, distribute-k or 0s and 1s; repeatable."),
    ] = None,
    kept: Annotated[
        int | None, typer.Option(help="K of the fixed masks; default: the policy's mean, rounded up.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The base, measured on the same images. Default: the one in the RUN folder, if it is there."),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="FLOPs only: lccl, or lccl=0.4 with that share of zeros instead of the measured one."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of random-k.")] = 0,
    arch: Arch = None,
    shortcut: ShortcutKind = None,
    dropped_transition: DroppedRule = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize_short: ResizeShort = None,
    class_names: ClassNames = None,
    check_against: CheckAgainst = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Accuracy, block usage mean +- std, FLOPs per image (2 x MAC, conv and linear, policy included), unique masks."""
    import torch

    from bdexport.checkpoint import build_model, load_checkpoint
    from bdexport.dataset import check_classes, load_dataset, unnamed_classes
    from bdexport.evaluate import evaluate_model
    from bdexport.evaluate_base import base_figures
    from bdexport.models.lccl import lccl_reference
    from bdexport.train.data import DeviceImages

    references = {word: _zeros(word) for word in reference or []}

    loading = Loading(arch, shortcut, dropped_transition, mean, std, size, resize_short, class_names)
    found = load_checkpoint(checkpoint, **loading.arguments())
    # Of a run with --method fixed: the mask that it was finetuned under, unless another is asked for.
    trained_for = found.training.get("fixed_mask")
    masks = fixed or ([] if trained_for is None else [trained_for["mask"]])
    _refuse_without_effect(context, masks)
    chosen = load_dataset(dataset, data, split, limit=images, skip_damaged=skip_damaged, max_pixels=max_pixels)
    show_skipped(chosen)
    check_classes(chosen, found.network.num_classes, found.class_names)
    say_assumed(found, checkpoint)
    model = build_model(found, with_policy=False)
    checked = _checked(model, found, check_against, chosen, json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = DeviceImages(chosen.arrays(found.preprocess), chosen.labels, found.preprocess, device)
    with progress() as bar:

        def batches(title: str) -> Iterable[tuple[Tensor, Tensor]]:
            return bar.track(source.batches(batch), total=-(-len(source) // batch), description=title)

        result = evaluate_model(
            model,
            batches,
            found.preprocess.size,
            has_policy=found.policy is not None,
            fixed=masks,
            kept=kept if kept is not None or trained_for is None else trained_for["kept"],
            seed=seed,
        )
        for word, zeros in references.items():
            row = lccl_reference(model, batches(word), found.preprocess.size, zeros)
            result.setdefault("reference", {})[word] = row

        def tracked(base_batches: Iterable[tuple[Tensor, Tensor]], total: int) -> Iterable[tuple[Tensor, Tensor]]:
            return bar.track(base_batches, total=total, description="the base")

        figures = base_figures(checkpoint, found, base, chosen, result, batch=batch, tracked=tracked)
    result = _described(checkpoint, found, chosen) | checked | result
    result |= {"base": None if figures is None else figures.to_json()}
    if json is not None:  # before the tables, whose reader may have gone
        write_json_result(json, result)
    _print_table(result, json)
    _print_base(figures, found.training, json)
    for note in unnamed_classes(chosen, found.class_names):
        table_console(json).print(note, soft_wrap=True)


def _checked(
    model: BlockDropNet, found: Checkpoint, against: Path | None, chosen: Dataset, json: str | None
) -> dict[str, Any]:
    """What comparing the logits gave, for the result; raises VerificationError where they differ."""
    if against is None:
        return {}
    from bdexport.checkpoint.against import against_text, check_against

    record = check_against(model, found, against, chosen)
    table_console(json).print(against_text(record), soft_wrap=True)
    return {"checked_against": record}


def _refuse_without_effect(context: typer.Context, masks: list[str]) -> None:
    """Refuse options that none of the fixed masks would use. Raises UsageError."""
    if all(set(name) <= {"0", "1"} for name in masks):
        refuse(
            context, ("kept",), "on masks that say themselves what they keep", "pass --fixed first-k, or leave it out"
        )
    if "random-k" not in masks:
        refuse(context, ("seed",), "on masks that are not random", "pass --fixed random-k, or leave it out")


def _described(path: Path, checkpoint: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """What was evaluated: the result's first keys."""
    from bdexport.checkpoint import loading_record
    from bdexport.checkpoint.reading import checkpoint_file
    from bdexport.files import sha256_file
    from bdexport.report.sources import trained_record

    return {
        "schema": "bdexport.evaluate/1",
        "checkpoint": path,
        "checkpoint_sha256": sha256_file(checkpoint_file(path)),
        "architecture": checkpoint.network.name,
        "dataset": {"name": dataset.name, "split": dataset.split, "images": len(dataset), "skipped": dataset.skipped},
        "num_blocks": checkpoint.network.num_blocks,
        "pruned": checkpoint.network.inner_widths is not None,
        "loading": loading_record(checkpoint),
        **trained_record(checkpoint.training),
    }


def _print_base(figures: BaseFigures | None, training: dict[str, Any], json: str | None) -> None:
    """What the table cannot say of the base: that it is known for other images only, or not at all."""
    from bdexport.base_figures import was_trained

    out = table_console(json)
    if figures is not None and not figures.here:
        out.print(f"{figures.sentence()}; --base CKPT measures it on these images", soft_wrap=True)
    elif figures is None and was_trained(training):
        out.print("your base's accuracy is not on record: --base CKPT measures it on these images", soft_wrap=True)


def _zeros(word: str) -> float | None:
    """``lccl=0.4`` -> 0.4, ``lccl`` -> None: the share of zeros is measured. Raises UsageError on anything else."""
    from bdexport.errors import UsageError

    name, equals, share = word.partition("=")
    try:
        zeros = float(share) if equals else None
    except ValueError:
        zeros = -1.0
    if name != "lccl" or not (zeros is None or 0 <= zeros <= 1):
        raise UsageError("--reference", got=repr(word), expected="lccl, or lccl=SHARE with a share of zeros in 0..1")
    return zeros


def _print_table(result: dict[str, Any], json: str | None) -> None:
    where = result["dataset"]
    network = f"{result['architecture']}{' (pruned)' if result['pruned'] else ''}, {result['num_blocks']} blocks"
    title = f"{network}, {where['name']} {where['split']}, {where['images']} images"
    base = result["base"] if result["base"] is not None and result["base"]["here"] else None
    heading = [] if base is None else ["against it"]
    table = FittedTable("", "accuracy", *heading, "blocks used", "FLOPs", "masks", title=title)
    full, blocks = result["full"], f"{result['num_blocks']:.1f}"
    if base is not None:  # the same network, and so the same FLOPs, unless it was pruned since
        table.add_row("your base", f"{base['accuracy']:.2f} %", "", blocks, "", "1")

    def figures(row: dict[str, Any]) -> list[str]:
        own = f"{row['accuracy']:.2f} %"
        return [own] if base is None else [own, f"{row['accuracy'] - base['accuracy']:+.2f}"]

    table.add_row("full", *figures(full), blocks, f"{full['flops']:.3e}", "1")
    rows = [("policy", result["policy"])] if "policy" in result else []
    rows += [(result["gates"]["kind"], result["gates"])] if "gates" in result else []
    for name, row in [*rows, *result.get("fixed", {}).items()]:
        used, flops = row["blocks_used"], row["flops"]
        table.add_row(
            name,
            *figures(row),
            f"{used['mean']:.1f} +- {used['std']:.1f}",
            f"{flops['mean']:.3e} +- {flops['std']:.1e}",
            str(row["unique_masks"]),
        )
    for word, row in result.get("reference", {}).items():
        flops = row["flops"]
        table.add_row(
            f"{word} (reference)",
            "-",
            *[""] * len(heading),
            "-",
            f"{flops['mean']:.3e} +- {flops['std']:.1e}",
            "-",
        )
    out = table_console(json)
    out.print(table)
    if base is not None:
        out.print(f"your base: {base['name']}, {base['how']}", soft_wrap=True)
    references = result.get("reference", {})
    for word, row in references.items():
        out.print(
            f"{word}: FLOPs alone, no such network is run; {100 * row['zeros']:.1f} % zeros {row['zeros_are']}, "
            f"{row['saved_percent']:.1f} % less than full"
        )
    if references:
        published = next(iter(references.values()))["published"]
        percent = published["inference_accelerated_percent"]
        out.print(f"published: inference accelerated by {percent:.0f} % ({published['source']})")
    if not rows:
        out.print("no policy in this checkpoint: 'bdexport train --base CHECKPOINT' gives it one")
