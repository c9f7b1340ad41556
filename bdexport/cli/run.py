"""``bdexport run``: classify images, and show which blocks each of them took."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import err_console, table_console, write_json_result
from bdexport.cli.options import MaxPixels, VerifyKey, refuse_threads, writable
from bdexport.config import RunConfig
from bdexport.files import shown, usable_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.text import Text

    from bdexport.bundle import Manifest
    from bdexport.parts import Masks
    from bdexport.runtime import Orchestrator, Result

DEFAULT = RunConfig()
SIGNS = {"kept": "■", "dropped": "□", "kept transition": "◆", "dropped transition": "◇"}
PLAIN_SIGNS = {"kept": "#", "dropped": ".", "kept transition": "T", "dropped transition": "t"}
STYLES = {"kept": "green", "dropped": "dim", "kept transition": "bold green", "dropped transition": "yellow"}


def run(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="BUNDLE folder.")],
    image: Annotated[list[Path], typer.Argument(help="Image files, or folders; all images below a folder are taken.")],
    max_pixels: MaxPixels = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: the backend's choice.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run. Default: the backend's.")] = None,
    executor: Annotated[str, typer.Option(help="How paths are run; auto: as measured at build time.")] = "auto",
    verify_key: VerifyKey = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Class, confidence, the path through the blocks, and the time, image by image.

    An image that cannot be read is reported and the others are run; the exit code is 1 then.
    """
    from bdexport.errors import ImageError
    from bdexport.runtime import load

    out = table_console(json)
    entries: list[dict[str, Any]] = []
    problems: list[ImageError] = []
    with load(bundle, threads=threads, device=device, executor=executor, verify_key=verify_key) as orchestrator:
        refuse_threads(context, orchestrator.device)
        orchestrator.warm_up()
        files = _image_files(image)
        for path in files:
            try:
                entry, mask = _run_image(orchestrator, path, max_pixels)
            except ImageError as error:
                problems.append(error)
                entries.append({"image": path, "error": str(error)})
                if len(files) > 1:
                    err_console.print(f"not read: {error}", soft_wrap=True)
                continue
            entries.append(entry)
            _print_entry(out, entry, mask, orchestrator.manifest)
        result = _result(orchestrator, entries)
    if len(problems) < len(files):
        out.print(_legend(out), soft_wrap=True)
    if json is not None:
        write_json_result(json, result)
    if problems:
        raise problems[0] if len(files) == 1 else ImageError(f"{len(problems)} of {len(files)} images were not read")


def _image_files(paths: Sequence[Path]) -> list[Path]:
    from bdexport.dataset import image_files

    return [
        file for path in paths for file in (image_files(path, recursive=True) if usable_path(path).is_dir() else [path])
    ]


def _run_image(orchestrator: Orchestrator, path: Path, max_pixels: int | None) -> tuple[dict[str, Any], Masks]:
    from bdexport.limits import MAX_PIXELS
    from bdexport.preprocess import read_image

    image = read_image(path, max_pixels=max_pixels or MAX_PIXELS)
    pixels = orchestrator.manifest.preprocess.fit_image(image)[None]
    results = [orchestrator(pixels) for _ in range(DEFAULT.timed_calls)]
    return _entry(path, results, orchestrator), results[0].masks[0]


def _entry(path: Path, results: Sequence[Result], orchestrator: Orchestrator) -> dict[str, Any]:
    from bdexport.parts import mask_to_text, path_parts

    first, manifest = results[0], orchestrator.manifest
    label = int(first.classes[0])
    return {
        "image": path,
        "class": manifest.class_names[label],
        "label": label,
        "confidence": float(first.confidence[0]),
        "blocks_used": int(first.blocks_used[0]),
        "mask": mask_to_text(first.masks[0]),
        "path": path_parts(first.masks[0], manifest.transitions),
        "time_ms": {name: median(result.timings[name] for result in results) for name in first.timings},
    }


def _result(orchestrator: Orchestrator, entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": "bdexport.run/1",
        "bundle": orchestrator.bundle.path,
        "backend": orchestrator.manifest.backend,
        "executor": orchestrator.executor,
        "executor_reason": orchestrator.executor_reason,
        "device": orchestrator.device,
        "threads": orchestrator.threads,
        "num_blocks": orchestrator.manifest.num_blocks,
        "timed_calls": DEFAULT.timed_calls,
        "images": entries,
    }


def _print_entry(out: Console, entry: dict[str, Any], mask: Masks, manifest: Manifest) -> None:
    times = entry["time_ms"]
    out.print(
        f"{shown(entry['image'])}: {entry['class']} ({100 * entry['confidence']:.1f} %), "
        f"{entry['blocks_used']} of {manifest.num_blocks} blocks, {times['total']:.2f} ms "
        f"(policy {times['policy']:.2f}, network {times['network']:.2f})",
        soft_wrap=True,
    )
    out.print(_drawn(out, mask, manifest.transitions), soft_wrap=True)


def _drawn(out: Console, mask: Masks, transitions: Sequence[int]) -> Text:
    """One sign per block, a gap before every stage."""
    from rich.text import Text

    signs, text = _signs(out), Text("  ")
    for index, keep in enumerate(mask.tolist()):
        kind = ("kept" if keep else "dropped") + (" transition" if index in transitions else "")
        if index in transitions and index > 0:
            text.append(" ")
        text.append(signs[kind], STYLES[kind])
    return text


def _legend(out: Console) -> Text:
    from rich.text import Text

    signs = "  ".join(f"{sign} {kind}" for kind, sign in _signs(out).items())
    return Text(f"{signs} (its shortcut still runs); time: median of {DEFAULT.timed_calls} calls, decoding left out")


def _signs(out: Console) -> dict[str, str]:
    return SIGNS if out.encoding.lower().startswith("utf") else PLAIN_SIGNS
