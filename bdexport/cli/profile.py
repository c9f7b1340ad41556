"""``bdexport profile``: where the time of a call goes, part by part; a table, JSON and a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, table_console, write_json_result
from bdexport.cli.options import MaxPixels, VerifyKey, refuse, refuse_threads, writable
from bdexport.cli.stages import quiet_progress, updates
from bdexport.config import ProfileConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bdexport.runtime import Orchestrator

DEFAULT = ProfileConfig()
SYNTHETIC = "synthetic"
SHOWN_PATHS = 12
MAX_SYNTHETIC_BYTES = 1_000_000_000


def profile(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="BUNDLE folder.")],
    dataset: Annotated[
        str, typer.Option(help="synthetic (random images); or cifar10, cifar100, folder, digits, cifar10-samples.")
    ] = DEFAULT.dataset,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set (synthetic, digits and samples need none).")
    ] = None,
    max_pixels: MaxPixels = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = DEFAULT.split,
    images: Annotated[int, typer.Option(min=1, help="The first N images, or all if there are fewer.")] = DEFAULT.images,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = DEFAULT.batch,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute one call. Default: the backend's choice.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to run. Default: the backend's.")] = None,
    executor: Annotated[str, typer.Option(help="How paths are run; auto: as measured at build time.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Profiled calls per batch.")] = DEFAULT.rounds,
    verify_key: VerifyKey = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for chrome://tracing or Perfetto here.")] = None,
) -> None:
    """Time per part, between parts, for copies and regrouping; what bounds each part; what measuring itself costs.

    Which blocks run is the policy's decision, so use images that it was trained for (--dataset) to see their share.
    """
    from bdexport.bench import profile as profile_calls
    from bdexport.bench import profile_result, write_trace
    from bdexport.files import check_writable
    from bdexport.runtime import load

    if dataset == SYNTHETIC:
        refuse(
            context,
            ("data", "split", "max_pixels"),
            "with synthetic images",
            "name the data set with --dataset, or leave it out",
        )
    if trace is not None:  # before minutes of measuring, not after
        check_writable(trace)
    # The fused paths are timed whatever the executor is.
    opened = load(bundle, threads=threads, device=device, executor=executor, fused=True, verify_key=verify_key)
    with opened as orchestrator, quiet_progress() as bar:
        refuse_threads(context, orchestrator.device)
        chosen, about = _images(orchestrator, dataset, data, split, images, max_pixels)
        measured = profile_calls(
            orchestrator,
            chosen,
            batch=min(batch, len(chosen)),
            rounds=rounds,
            progress=updates(bar, "profiling, several ways in turn"),
        )
        result = profile_result(orchestrator, measured, about)
    if trace is not None:
        kept = ("schema", "architecture", "backend", "precision", "executor", "device", "threads", "batch")
        write_trace(trace, measured, {key: result[key] for key in kept})
    if json is not None:  # before the tables, whose reader may have gone
        write_json_result(json, result)
    out = table_console(json)
    out.print(_parts_table(result))
    out.print(_stages_table(result))
    if result["fused"] is not None:
        out.print(_fused_table(result))
    for line in _remarks(result, batch, trace):
        out.print(line, soft_wrap=True)


def _images(
    orchestrator: Orchestrator, dataset: str, data: Path | None, split: str, count: int, max_pixels: int | None
) -> tuple[NDArray[np.uint8], dict[str, str]]:
    """uint8 (N, H, W, 3) at the network's size, and what they are."""
    from bdexport.dataset import check_classes, load_dataset
    from bdexport.errors import UsageError
    from bdexport.verify_comparison import random_images

    preprocess = orchestrator.manifest.preprocess
    if dataset != SYNTHETIC:
        chosen = load_dataset(dataset, data, split, limit=count, max_pixels=max_pixels)
        check_classes(chosen, len(orchestrator.class_names), orchestrator.class_names)
        return chosen.arrays(preprocess), {"name": chosen.name, "split": chosen.split}
    height, width = preprocess.size
    if count * height * width * 3 > MAX_SYNTHETIC_BYTES:
        remedy = "repeat fewer with --rounds"
        most = MAX_SYNTHETIC_BYTES // (height * width * 3)
        raise UsageError(
            "--images: too many to be made in memory", got=count, expected=f"at most {most}", remedy=remedy
        )
    return random_images(count, preprocess.size, seed=0), {"name": SYNTHETIC, "split": "none"}


def _parts_table(result: dict[str, Any]) -> FittedTable:
    how = f"batch {result['batch']}, {result['backend']} {result['precision']} on {result['device']}"
    threads = "" if result["threads"] is None else f", {result['threads']} thread{'s' * (result['threads'] != 1)}"
    where = f"{result['dataset']['name']}, {result['images']} images"
    table = FittedTable(
        "part",
        title=f"{result['architecture']}, {where}, {how}{threads}",
        expendable=("MFLOPs", "GFLOP/s", "p90", "images"),
    )
    for name in ("images", "p50", "p90", "share", "gap before", "MFLOPs", "GFLOP/s", "bound by"):
        table.add_column(name, justify="right")
    for entry in result["parts"]:
        table.add_row(
            entry["part"],
            f"{entry['images'] / result['images']:.0%}",
            _ms(entry["p50_ms"]),
            _ms(entry["p90_ms"]),
            f"{entry['share']:.1%}",
            _ms(entry["gap_ms"]),
            f"{entry['flops'] / 1e6:.2f}",
            "-" if entry["gflops_per_s"] is None else f"{entry['gflops_per_s']:.1f}",
            entry["bound"] or "-",
            style=None if entry["runs"] else "dim",
        )
    full = result["full"]
    table.add_section()
    table.add_row(
        *("full (own engine, whole call)", "", _ms(full["p50"]), _ms(full["p90"]), "", ""),
        *(f"{full['flops'] / 1e6:.2f}", f"{full['gflops_per_s']:.1f}", ""),
    )
    return table


def _stages_table(result: dict[str, Any]) -> FittedTable:
    table = FittedTable("one call", title="what a call is made of")
    for name in ("mean", "p50", "p90", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    for entry in result["stages"]:
        times = (_ms(entry[name]) for name in ("mean_ms", "p50_ms", "p90_ms"))
        table.add_row(entry["stage"], *times, f"{entry['share']:.1%}", entry["meaning"])
    call = result["call_ms"]
    table.add_section()
    table.add_row("all", _ms(call["mean"]), _ms(call["p50"]), _ms(call["p90"]), "100.0%", "")
    return table


def _fused_table(result: dict[str, Any]) -> FittedTable:
    """The paths that ran, most images first."""
    fused = result["fused"]
    call = fused["call_ms"]
    title = f"the same images through the fused paths: {fused['hit_rate']:.1%} are hits; a call: p50 {_ms(call['p50'])}"
    table = FittedTable("mask (block 0 first)", title=title, expendable=("MFLOPs", "p90"))
    for name in ("blocks", "images", "p50", "p90", "share", "MFLOPs", "GFLOP/s"):
        table.add_column(name, justify="right")
    ran = [entry for entry in fused["paths"] if entry["runs"]]
    for entry in ran[:SHOWN_PATHS]:
        table.add_row(
            entry["mask"],
            str(entry["blocks"]),
            f"{entry['images'] / fused['images']:.1%}",
            _ms(entry["p50_ms"]),
            _ms(entry["p90_ms"]),
            f"{entry['share']:.1%}",
            f"{entry['flops'] / 1e6:.2f}",
            f"{entry['gflops_per_s']:.1f}",
        )
    table.add_section()
    rest = ran[SHOWN_PATHS:]
    if rest:
        images, share = (sum(entry[name] for entry in rest) for name in ("images", "share"))
        table.add_row(f"{len(rest)} more paths", "", f"{images / fused['images']:.1%}", "", "", f"{share:.1%}", "", "")
    missed, unused = fused["missed"], len(fused["paths"]) - len(ran)
    share = f"{missed['share']:.1%}"
    table.add_row("other masks, part by part", "", f"{missed['images'] / fused['images']:.1%}", "", "", share, "", "")
    if unused:
        table.add_row(f"{unused} path{'s' * (unused != 1)} that no image took", "", "0.0%", "", "", "", "", "")
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms"


def _remarks(result: dict[str, Any], batch: int, trace: Path | None) -> list[str]:
    """What the numbers are, and how far they can be trusted."""
    cost, measured, used = result["instrumentation"], result["measured"], result["blocks_used"]
    medians = [cost[side]["p50"] for side in ("as_run_ms", "part_by_part_ms", "profiled_ms")]
    lines = [
        "p50 of a whole call: {:.3f} ms as it runs, {:.3f} ms part by part, {:.3f} ms profiled; ".format(*medians)
        + f"the clocks take {cost['clock_us_per_event']:.2f} us an event, {cost['events_per_call']:.1f} events a call: "
        f"{cost['clocks_share']:.1%} of a profiled call",
        f"executor {result['executor']} ({result['executor_reason']}); blocks run {used['mean']:.1f} +- "
        f"{used['std']:.1f} of {result['num_blocks']}",
        f"bound by: {result['criterion']['text']}",
        f"{measured['calls']} calls of each side in turn, after {measured['warmup_calls']} for warm-up; "
        f"{measured['input']}; {result['machine']['cpu']}, {result['machine']['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items())),
        *result["notes"],
    ]
    if result["dataset"]["name"] == SYNTHETIC:
        lines.append("random images: times are right, which blocks run is not what real images would make of it")
    if batch != result["batch"]:
        lines.append(f"batch {batch} is more than there are images: profiled with {result['batch']}")
    elif measured["images_not_timed"]:
        lines.append(f"the last {measured['images_not_timed']} images fill no batch: they were left out")
    if trace is not None:
        lines.append(f"trace: {trace} (open it in chrome://tracing or Perfetto)")
    return lines
