"""``bdexport rebuild``: a bundle's engines built anew from its own graphs, for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import err_console, progress, table_console, write_json_result
from bdexport.cli.options import VerifyKey, writable
from bdexport.cli.stages import stages_of

if TYPE_CHECKING:
    from bdexport.rebuild import RebuiltBundle


def rebuild(
    bundle: Annotated[Path, typer.Argument(help="BUNDLE folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the new bundle here. Default: in the old one's place, once complete.")
    ] = None,
    verify_key: VerifyKey = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Build a bundle's engines anew from its own graphs: for another ONNX Runtime, OpenVINO or processor.

    The checkpoint, torch and onnx are not needed. The new engines are verified against the graphs.
    """
    from bdexport.bundle import open_bundle
    from bdexport.files import check_new_folder, refuse_existing
    from bdexport.rebuild import rebuild_bundle

    if out is not None:
        refuse_existing(out, overwrite=False)
        check_new_folder(out)
    with progress() as bar:
        made = rebuild_bundle(open_bundle(bundle, verify_key), out, progress=stages_of(bar))
    for note in made.notes:
        err_console.print(note)
    result = _result(bundle, made)
    table_console(json).print(_summary(made, result), soft_wrap=True)
    if json is not None:
        write_json_result(json, result)


def _result(bundle: Path, made: RebuiltBundle) -> dict[str, Any]:
    manifest, misfit = made.manifest, made.misfit
    return {
        "schema": "bdexport.rebuild/1",
        "bundle": bundle,
        "out": made.path,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "parts": len(manifest.parts),
        "why": None if misfit is None else {"what": misfit.what, "got": misfit.got, "here": misfit.here},
        "versions": manifest.versions,
        "fingerprint": manifest.fingerprint,
        "seconds": round(made.seconds, 3),
        "verification": manifest.verification,
        "notes": made.notes,
    }


def _summary(made: RebuiltBundle, result: dict[str, Any]) -> str:
    why, checked = made.misfit, result["verification"]
    before = "which fitted before" if why is None else f"before: {why.what} ({why.got})"
    verified = (
        "" if checked is None else f"; largest logit difference from its graphs {checked['max_logit_difference']:.1e}"
    )
    return (
        f"{made.path}: {result['parts']} engines rebuilt for {made.manifest.backend} {made.manifest.precision} "
        f"on {made.manifest.fingerprint}, {before}; {made.seconds:.1f} s{verified}"
    )
