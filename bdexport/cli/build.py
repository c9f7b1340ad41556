"""``bdexport build``: a checkpoint becomes a bundle that runs without torch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.backends import BACKENDS
from bdexport.cli.console import FittedTable, err_console, progress, table_console, write_json_result
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
from bdexport.cli.stages import show_skipped, size_text, stages_of
from bdexport.config import CALIBRATED, BuildConfig, CalibrationConfig, FusedConfig, TensorRTConfig, VerifyConfig
from bdexport.fused import MOST_FUSED, shares_text

if TYPE_CHECKING:
    from rich.table import Table

    from bdexport.build import BuiltBundle
    from bdexport.dataset import Dataset

DEFAULTS, FUSED, CALIBRATION, VERIFY = BuildConfig(), FusedConfig(), CalibrationConfig(), VerifyConfig()
TENSORRT = DEFAULTS.tensorrt
SIZES = {"before": "bytes_before", "after": "bytes_after"}
PANEL = "TensorRT (backends tensorrt and tensorrt-rtx)"


def build(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, PyTorch file or zoo:NAME.")],
    out: Annotated[Path | None, typer.Option(help="BUNDLE folder. Default: engines/NAME of the checkpoint.")] = None,
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(BACKENDS)}.")] = DEFAULTS.backend,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8 or fp8, as the backend offers.")
    ] = DEFAULTS.precision,
    max_batch: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Largest batch that the bundle accepts. Default: any; {TENSORRT.max_batch} for TensorRT."
        ),
    ] = DEFAULTS.max_batch,
    jobs: Annotated[int, typer.Option(min=1, help="Engines built at a time.")] = DEFAULTS.jobs,
    fused: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_FUSED,
            help="Masks that run as one engine each. Default: enough for 95 % of the images, at most 32.",
        ),
    ] = FUSED.paths,
    mask_images: Annotated[
        int, typer.Option(min=1, help="Validation images of --dataset on which masks are counted.")
    ] = FUSED.mask_images,
    max_bundle_mb: Annotated[
        float | None, typer.Option(help="Largest bundle, in 10^6 bytes; fused paths add none.")
    ] = FUSED.max_bundle_mb,
    quantise_masks: Annotated[
        str | None,
        typer.Option(help="Run another mask instead: cover (the cheapest fused one that keeps as much) or budget."),
    ] = FUSED.quantise,
    accuracy_budget: Annotated[
        float, typer.Option(help="Points of validation accuracy that 'budget' may lose.")
    ] = FUSED.accuracy_budget,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Choose the executor for 'auto' by measuring.")
    ] = FUSED.measure,
    mask: Annotated[
        str | None,
        typer.Option(help="One mask of 0s and 1s for every image, block 0 first, instead of a policy."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="For masks, scales (int8, fp8) and accuracy against torch: cifar10, .."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits and samples need none).")] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out image files that cannot be decoded, and list them.")
    ] = False,
    max_pixels: MaxPixels = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A list that `bdexport calibrate` wrote, for int8 or fp8.")
    ] = None,
    calibration_images: Annotated[
        int, typer.Option(min=1, help="Images for scales (int8, fp8) where no list is given.")
    ] = CALIBRATION.images,
    images: Annotated[
        int, typer.Option(min=1, help=f"Images of the {VERIFY.accuracy_split} split for accuracy.")
    ] = VERIFY.accuracy_images,
    max_drop: Annotated[
        float, typer.Option(min=0, help="Largest loss of accuracy against torch, in points.")
    ] = VERIFY.max_accuracy_drop,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    sign: Annotated[
        Path | None, typer.Option(help="Sign it with this minisign secret key, one without a password.")
    ] = None,
    arch: Arch = None,
    shortcut: ShortcutKind = None,
    dropped_transition: DroppedRule = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize_short: ResizeShort = None,
    class_names: ClassNames = None,
    check_against: CheckAgainst = None,
    min_batch: Annotated[
        int, typer.Option(help="Smallest batch; more than 1 for equal masks only.", rich_help_panel=PANEL)
    ] = TENSORRT.min_batch,
    opt_batch: Annotated[
        int, typer.Option(help="Batch that kernels are chosen for.", rich_help_panel=PANEL)
    ] = TENSORRT.opt_batch,
    workspace_mib: Annotated[
        int | None, typer.Option(help="Device memory an engine may use as scratch.", rich_help_panel=PANEL)
    ] = TENSORRT.workspace_mib,
    optimization_level: Annotated[
        int | None, typer.Option(help="0 (builds fast) to 5 (runs fast).", rich_help_panel=PANEL)
    ] = TENSORRT.optimization_level,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Allow TF32 for float32 products.", rich_help_panel=PANEL)
    ] = TENSORRT.tf32,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Load in later releases, too.", rich_help_panel=PANEL)
    ] = TENSORRT.version_compatible,
    hardware_compatible: Annotated[
        str | None,
        typer.Option(help="ampere+ or same-compute-capability (tensorrt only).", rich_help_panel=PANEL),
    ] = TENSORRT.hardware_compatible,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPU to build for, e.g. 8.9; may be repeated (tensorrt-rtx only).", rich_help_panel=PANEL),
    ] = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Export the parts, build an engine of each, verify them against torch, and write one bundle."""
    from bdexport.backends.base import fuses_paths
    from bdexport.build import build_bundle, checked_backend
    from bdexport.calibrate import CalibrationRequest
    from bdexport.files import check_new_folder

    tensorrt = TensorRTConfig(
        min_batch=min_batch,
        opt_batch=opt_batch,
        workspace_mib=workspace_mib,
        optimization_level=optimization_level,
        tf32=tf32,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        compute_capabilities=tuple(compute_capability or ()),
    )
    settings = FusedConfig(
        paths=fused,
        max_bundle_mb=max_bundle_mb,
        measure=measure,
        mask_images=mask_images,
        quantise=quantise_masks,
        accuracy_budget=accuracy_budget,
    )
    config = BuildConfig(backend, precision, max_batch, jobs, fused=settings, tensorrt=tensorrt)
    fuses = fuses_paths(checked_backend(config))  # before a data set is read
    if out is not None:
        check_new_folder(out, overwrite)
    if mask is not None:
        refuse(context, ("mask_images", "quantise_masks"), "with --mask, which every image runs")
    _refuse_without_effect(context, dataset, calibration, scaled=precision in CALIBRATED, fuses=fuses)
    request = CalibrationRequest(
        replace(CALIBRATION, images=calibration_images), dataset, data, calibration, max_pixels
    )
    loading = Loading(arch, shortcut, dropped_transition, mean, std, size, resize_short, class_names)
    started = time.perf_counter()
    with progress() as bar:
        bundle = build_bundle(
            checkpoint,
            out,
            config=config,
            loading=loading.arguments(),
            loaded=lambda found: say_assumed(found, checkpoint),
            check_against=check_against,
            overwrite=overwrite,
            progress=stages_of(bar),
            calibration=request,
            counted=_split(dataset, data, "validation", mask_images, skip_damaged, max_pixels) if fuses else None,
            judged=_split(dataset, data, VERIFY.accuracy_split, images, skip_damaged, max_pixels),
            verify=replace(VERIFY, max_accuracy_drop=max_drop),
            mask=mask,
            sign=sign,
            note=lambda text: err_console.print(text, soft_wrap=True),
        )
    result = _result(bundle, time.perf_counter() - started)
    if json is not None:  # before the tables, whose reader may have gone
        write_json_result(json, result)
    for note in bundle.notes:
        err_console.print(note)
    shown = table_console(json)
    if bundle.quantisation:
        shown.print(_quantisation(bundle))
    shown.print(_summary(bundle, result), soft_wrap=True)


def _refuse_without_effect(
    context: typer.Context, dataset: str | None, calibration: Path | None, *, scaled: bool, fuses: bool
) -> None:
    """``scaled``: the precision has scales; ``fuses``: the backend runs fused paths. Raises UsageError."""
    if not scaled:
        refuse(
            context,
            ("calibration", "calibration_images"),
            "without scales",
            "pass --precision int8 or fp8, or leave it out",
        )
    if calibration is not None:
        refuse(context, ("calibration_images",), "with --calibration, which names its images")
    if dataset is None:
        if calibration is None:
            refuse(context, ("data",), "without the name of what is in the folder", "pass --dataset too")
            refuse(context, ("max_pixels",), "without images")
        needing = ("mask_images", "images", "max_drop", "calibration_images", "quantise_masks", "skip_damaged")
        refuse(context, needing, "without images", "pass --dataset D and --data DIR, or leave it out")
    if not fuses:
        refuse(context, ("mask_images",), "on a backend that runs no fused paths")


def _split(
    dataset: str | None, data: Path | None, split: str, images: int, skip_damaged: bool, max_pixels: int | None
) -> Dataset | None:
    """Images of a split, or of the only one that the data set has; None where no data set is named."""
    if dataset is None:
        return None
    from bdexport.calibration_list import default_split
    from bdexport.dataset import load_dataset

    chosen = load_dataset(
        dataset,
        data,
        default_split(dataset, split),
        limit=images,
        skip_damaged=skip_damaged,
        max_pixels=max_pixels,
    )
    show_skipped(chosen)
    return chosen


def _result(bundle: BuiltBundle, seconds: float) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "schema": "bdexport.build/1",
        "bundle": bundle.path,
        "architecture": manifest.architecture,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "max_batch": manifest.max_batch,
        "parts": len(manifest.parts),
        "engines": {outcome: bundle.count(outcome) for outcome in ("built", "reused", "rebuilt")},
        "bytes": sum(entry.bytes for entry in manifest.files()),
        "seconds": round(seconds, 3),
        "verification": manifest.verification,
        "executor": manifest.executor,
        "fused": None if manifest.fused is None else manifest.fused.to_json() | (bundle.fusing or {}),
        "fixed_mask": manifest.extra.get("fixed_mask"),
        "mask_mapping": None if manifest.mask_mapping is None else manifest.mask_mapping.to_json(),
        "quantisation": list(bundle.quantisation),
        "policy_cost": bundle.policy_cost,
        "versions": manifest.versions,
        "loading": bundle.loading,
        "checked_against": bundle.checked_against,
        "notes": bundle.notes,
    }


def _quantisation(bundle: BuiltBundle) -> Table:
    mapping = bundle.manifest.mask_mapping
    facts = {} if mapping is None else mapping.facts
    title = f"masks, {facts.get('images')} {facts.get('split')} images; latency: batch 1, policy included"
    table = FittedTable("fused paths", "masks run", title=title)
    for name in ("accuracy", "drawn masks fused", "blocks", "FLOPs", "latency"):
        table.add_column(name, justify="right")
    for row in bundle.quantisation:
        numbers = f"{row['accuracy']:.2f} %", f"{100 * row['coverage']:.1f} %", f"{row['blocks']:.2f}"
        rule = "as drawn" if row["rule"] == "off" else row["rule"]
        table.add_row(str(row["paths"]), rule, *numbers, f"{row['flops']:.3e}", f"{row['latency_ms']:.3f} ms")
    return table


def _summary(bundle: BuiltBundle, result: dict[str, Any]) -> str:
    checked = result["verification"]
    verified = "" if checked is None else f"; largest logit difference from torch {checked['max_logit_difference']:.1e}"
    engines = ", ".join(f"{count} {outcome}" for outcome, count in result["engines"].items() if count)
    lines = (
        f"{bundle.path}: {result['architecture']} for {result['backend']} {result['precision']}, "
        f"{result['parts']} parts ({engines}), {size_text(result['bytes'])}, {result['seconds']:.1f} s{verified}"
    )
    fused, costs = bundle.manifest.fused, bundle.fusing
    if fused is not None and costs is not None:
        sizes = ", ".join(f"{when} {size_text(costs[key])}" for when, key in SIZES.items())
        lines += f"\n{shares_text(fused)}; made ready in {costs['seconds']:.2f} s; size: {sizes}"
    executor = result["executor"]
    return f"{lines}\nexecutor {executor['choice']}: {executor['reason']}"
