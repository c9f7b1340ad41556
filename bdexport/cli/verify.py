"""``bdexport verify``: whether a bundle computes what its network computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, progress, table_console, write_json_result
from bdexport.cli.loading import (
    Arch,
    DroppedRule,
    Loading,
    ShortcutKind,
    say_assumed,
)
from bdexport.cli.options import MaxPixels, VerifyKey, refuse, refuse_threads, writable
from bdexport.cli.stages import stages_of
from bdexport.config import VerifyConfig

if TYPE_CHECKING:
    from bdexport.bundle import Bundle
    from bdexport.dataset import Dataset
    from bdexport.models.pair import BlockDropNet

DEFAULT = VerifyConfig()
GRAPHS = "graphs"
EXPENDABLE = ("largest value", "mean")  # columns that a narrow terminal does without


def verify(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="BUNDLE folder.")],
    reference: Annotated[
        str, typer.Option(help="'graphs': the bundle's own ONNX, not optimised; or a checkpoint, run by torch.")
    ] = GRAPHS,
    masks: Annotated[int, typer.Option(min=0, help="Random masks to run as whole paths.")] = DEFAULT.random_masks,
    seed: Annotated[int, typer.Option(min=0, help="Of the random images and masks.")] = DEFAULT.seed,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference of a logit. Default: by the bundle's precision.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Also compare accuracy with the reference's, on this data set.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits and samples need none).")] = None,
    max_pixels: MaxPixels = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    images: Annotated[int, typer.Option(min=1, help="The first N images of it.")] = DEFAULT.accuracy_images,
    max_drop: Annotated[
        float, typer.Option(min=0, help="Largest loss of accuracy, in points.")
    ] = DEFAULT.max_accuracy_drop,
    arch: Arch = None,
    shortcut: ShortcutKind = None,
    dropped_transition: DroppedRule = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: the backend's choice.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run. Default: the backend's.")] = None,
    verify_key: VerifyKey = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Compare every part and whole paths with the reference; exit code 1 if one differs by more than the tolerance."""
    from bdexport.backends import get_backend
    from bdexport.backends.base import default_device
    from bdexport.bundle import open_bundle
    from bdexport.verify import require, verify_against_graphs, verify_against_model, with_tolerance
    from bdexport.verify_accuracy import accuracy_text, require_accuracy

    if dataset is None:
        needing = ("data", "split", "images", "max_drop", "max_pixels")
        refuse(context, needing, "without a data set to compare accuracy on", "pass --dataset too, or leave it out")
    if reference == GRAPHS:
        about_checkpoint = ("arch", "shortcut", "dropped_transition")
        refuse(context, about_checkpoint, "without a checkpoint as the reference", "pass --reference CKPT")
    loading = Loading(arch, shortcut, dropped_transition)
    opened = open_bundle(bundle, verify_key)
    if threads is not None:
        refuse_threads(context, device or default_device(get_backend(opened.manifest.backend)))
    chosen = replace(DEFAULT, random_masks=masks, seed=seed, max_accuracy_drop=max_drop)
    config = with_tolerance(chosen, opened.manifest.precision, tolerance)
    judged = None if dataset is None else _judged(opened, dataset, data, split, images, max_pixels)
    with progress() as bar:
        report = stages_of(bar)
        if reference == GRAPHS:
            result = verify_against_graphs(
                opened, config=config, threads=threads, device=device, progress=report, judged=judged
            )
        else:
            reference_model = _reference_model(opened, Path(reference), loading)
            result = verify_against_model(
                opened, reference_model, config=config, threads=threads, device=device, progress=report, judged=judged
            )
    result = {"schema": result["schema"], "bundle": bundle} | result
    if json is not None:  # before the tables, whose reader may have gone
        write_json_result(json, result)
    out = table_console(json)
    out.print(_parts_table(result))
    out.print(_paths_table(result))
    policy = result["policy"]
    fixed = opened.manifest.extra.get("fixed_mask")
    margin = f" (the closest probability is {policy['smallest_margin']:.1e} from the threshold)"
    decides, remark = ("policy", margin) if fixed is None else ("fixed mask", "")
    out.print(f"{decides}: the same mask for {policy['masks_equal']} of {policy['images']} images{remark}")
    verdict = "holds" if result["ok"] else "DIFFERS"
    out.print(
        f"{verdict}: largest logit difference {result['max_logit_difference']:.2e} from {result['reference']}; "
        f"worst part {result['worst_part']}, worst paths {result['worst_path']}"
    )
    if result["accuracy"] is not None:
        out.print(accuracy_text(result["accuracy"]), soft_wrap=True)
    require(result)
    if result["accuracy"] is not None:
        require_accuracy(result["accuracy"], f"{result['backend']} {result['precision']}")


def _reference_model(bundle: Bundle, path: Path, loading: Loading) -> BlockDropNet:
    """The network of a checkpoint; inputs are preprocessed as the bundle says, whatever the checkpoint says."""
    from bdexport.checkpoint import build_model, load_checkpoint
    from bdexport.errors import CheckpointError
    from bdexport.fixed_mask import KEY, model_with_mask

    manifest = bundle.manifest
    checkpoint = load_checkpoint(path, preprocess=manifest.preprocess, **_network_only(loading))
    say_assumed(checkpoint, path)
    ours = (checkpoint.network.name, checkpoint.network.num_blocks, checkpoint.network.num_classes)
    theirs = (manifest.architecture, manifest.num_blocks, len(manifest.class_names))
    if ours != theirs:
        names = ("{}, {} blocks, {} classes".format(*side) for side in (ours, theirs))
        raise CheckpointError(f"{path}: not the network of {bundle.path}", got=next(names), expected=next(names))
    fixed = manifest.extra.get(KEY)
    return build_model(checkpoint) if fixed is None else model_with_mask(checkpoint, fixed)


def _network_only(loading: Loading) -> dict[str, Any]:
    return {name: value for name, value in loading.arguments().items() if name != "preprocess"}


def _judged(
    bundle: Bundle, dataset: str, data: Path | None, split: str, images: int, max_pixels: int | None
) -> Dataset:
    from bdexport.dataset import check_classes, load_dataset

    chosen = load_dataset(dataset, data, split, limit=images, max_pixels=max_pixels)
    check_classes(chosen, len(bundle.manifest.class_names), bundle.manifest.class_names)
    return chosen


def _parts_table(result: dict[str, Any]) -> FittedTable:
    table = FittedTable(
        "part", title=f"parts against {result['reference']}, {result['images']} images", expendable=EXPENDABLE
    )
    _add_columns(table)
    for entry in result["parts"]:
        table.add_row(entry["part"], *_cells(entry))
    return table


def _paths_table(result: dict[str, Any]) -> FittedTable:
    table = FittedTable("paths", title=f"logits of whole paths against {result['reference']}", expendable=EXPENDABLE)
    table.add_column("masks", justify="right")
    _add_columns(table)
    for entry in result["paths"]:
        against = f", against {entry['against']}" if "against" in entry else ""
        table.add_row(entry["kind"] + against, str(entry["count"]), *_cells(entry))
    return table


def _add_columns(table: FittedTable) -> None:
    for name in ("largest difference", "mean", "largest value", "tolerance", "holds"):
        table.add_column(name, justify="right")


def _cells(entry: dict[str, Any]) -> list[str]:
    numbers = [f"{entry[name]:.2e}" for name in ("max_abs", "mean_abs", "scale", "tolerance")]
    return [*numbers, "ok" if entry["ok"] else "DIFFERS"]
