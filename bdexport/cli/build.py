"""``bdexport build``: a checkpoint becomes a bundle that runs without torch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bdexport.backends import BACKENDS
from bdexport.cli.console import err_console, progress, table_console, write_json_result
from bdexport.cli.stages import size_text, stages_of
from bdexport.config import BuildConfig, CalibrationConfig, TensorRTConfig, VerifyConfig

if TYPE_CHECKING:
    from bdexport.architecture import Shortcut
    from bdexport.build import BuiltBundle
    from bdexport.dataset import Dataset

DEFAULTS, CALIBRATION, VERIFY = BuildConfig(), CalibrationConfig(), VerifyConfig()
TENSORRT = DEFAULTS.tensorrt
PANEL = "TensorRT (backends tensorrt and tensorrt-rtx)"


def build(
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, PyTorch file or zoo:NAME.")],
    out: Annotated[Path | None, typer.Option(help="BUNDLE folder. Default: engines/NAME of the checkpoint.")] = None,
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(BACKENDS)}.")] = DEFAULTS.backend,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16 or int8, as the backend offers.")
    ] = DEFAULTS.precision,
    max_batch: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Largest batch that the bundle accepts. Default: any; {TENSORRT.max_batch} for TensorRT."
        ),
    ] = DEFAULTS.max_batch,
    jobs: Annotated[int, typer.Option(min=1, help="Engines built at a time.")] = DEFAULTS.jobs,
    arch: Annotated[str | None, typer.Option(help="The architecture that is expected, e.g. resnet32.")] = None,
    shortcut: Annotated[str | None, typer.Option(help="avgpool or option_a, where the file does not say.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Calibrate int8 on it, and compare accuracy with torch's: cifar10, folder, ..")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits and samples need none).")] = None,
    calibration: Annotated[Path | None, typer.Option(help="A list that `bdexport calibrate` wrote, for int8.")] = None,
    calibration_images: Annotated[
        int, typer.Option(min=1, help="Images for int8's scales where no list is given.")
    ] = CALIBRATION.images,
    images: Annotated[
        int, typer.Option(min=1, help=f"Images of the {VERIFY.accuracy_split} split for accuracy.")
    ] = VERIFY.accuracy_images,
    max_drop: Annotated[
        float, typer.Option(min=0, help="Largest loss of accuracy against torch, in points.")
    ] = VERIFY.max_accuracy_drop,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
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
    json: Annotated[str | None, typer.Option(help="Write the result to this file ('-': stdout).")] = None,
) -> None:
    """Export the parts, build an engine of each, verify them against torch, and write one bundle."""
    from bdexport.build import build_bundle
    from bdexport.calibrate import CalibrationRequest
    from bdexport.errors import UsageError

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
    if calibration is not None and precision != "int8":
        raise UsageError("--calibration", got=f"precision {precision}", expected="int8, the only one with scales")
    request = CalibrationRequest(replace(CALIBRATION, images=calibration_images), dataset, data, calibration)
    started = time.perf_counter()
    with progress() as bar:
        bundle = build_bundle(
            checkpoint,
            out,
            config=BuildConfig(backend, precision, max_batch, jobs, tensorrt),
            arch=arch,
            shortcut=cast("Shortcut | None", shortcut),  # load_checkpoint refuses any other word
            overwrite=overwrite,
            progress=stages_of(bar),
            calibration=request,
            judged=_judged(dataset, data, images),
            verify=replace(VERIFY, max_accuracy_drop=max_drop),
        )
    result = _result(bundle, time.perf_counter() - started)
    for note in bundle.notes:
        err_console.print(note)
    table_console(json).print(_summary(bundle, result))
    if json is not None:
        write_json_result(json, result)


def _judged(dataset: str | None, data: Path | None, images: int) -> Dataset | None:
    """The images on which accuracy is compared: none of those that the network was trained or calibrated on."""
    if dataset is None:
        return None
    from bdexport.calibration_list import default_split
    from bdexport.dataset import load_dataset

    return load_dataset(dataset, data, default_split(dataset, VERIFY.accuracy_split), limit=images)


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
        "versions": manifest.versions,
        "notes": bundle.notes,
    }


def _summary(bundle: BuiltBundle, result: dict[str, Any]) -> str:
    checked = result["verification"]
    verified = "" if checked is None else f"; largest logit difference from torch {checked['max_logit_difference']:.1e}"
    engines = ", ".join(f"{count} {outcome}" for outcome, count in result["engines"].items() if count)
    return (
        f"{bundle.path}: {result['architecture']} for {result['backend']} {result['precision']}, "
        f"{result['parts']} parts ({engines}), {size_text(result['bytes'])}, {result['seconds']:.1f} s{verified}"
    )
