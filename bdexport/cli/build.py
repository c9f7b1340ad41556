"""``bdexport build``: a checkpoint becomes a bundle that runs without torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bdexport.backends import BACKENDS
from bdexport.cli.console import err_console, progress, table_console, write_json_result
from bdexport.cli.stages import size_text, stages_of
from bdexport.config import BuildConfig

if TYPE_CHECKING:
    from bdexport.architecture import Shortcut
    from bdexport.build import BuiltBundle

DEFAULTS = BuildConfig()


def build(
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, PyTorch file or zoo:NAME.")],
    out: Annotated[Path | None, typer.Option(help="BUNDLE folder. Default: engines/NAME of the checkpoint.")] = None,
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(BACKENDS)}.")] = DEFAULTS.backend,
    precision: Annotated[str, typer.Option(help="What the engines compute in.")] = DEFAULTS.precision,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Largest batch that the bundle accepts. Default: any.")
    ] = DEFAULTS.max_batch,
    jobs: Annotated[int, typer.Option(min=1, help="Engines built at a time.")] = DEFAULTS.jobs,
    arch: Annotated[str | None, typer.Option(help="The architecture that is expected, e.g. resnet32.")] = None,
    shortcut: Annotated[str | None, typer.Option(help="avgpool or option_a, where the file does not say.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    json: Annotated[str | None, typer.Option(help="Write the result to this file ('-': stdout).")] = None,
) -> None:
    """Export the parts, build an engine of each, verify them against torch, and write one bundle."""
    from bdexport.build import build_bundle

    started = time.perf_counter()
    with progress() as bar:
        bundle = build_bundle(
            checkpoint,
            out,
            config=BuildConfig(backend, precision, max_batch, jobs),
            arch=arch,
            shortcut=cast("Shortcut | None", shortcut),  # load_checkpoint refuses any other word
            overwrite=overwrite,
            progress=stages_of(bar),
        )
    result = _result(bundle, time.perf_counter() - started)
    for note in bundle.notes:
        err_console.print(note)
    table_console(json).print(_summary(bundle, result))
    if json is not None:
        write_json_result(json, result)


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
