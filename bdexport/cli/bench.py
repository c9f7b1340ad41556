"""``bdexport bench``: dynamic inference against the full network's engine, on a data set or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, err_console, table_console, write_json_result
from bdexport.cli.options import MaxPixels, VerifyKey, refuse, refuse_threads, writable
from bdexport.cli.stages import quiet_progress, show_skipped, updates
from bdexport.config import BenchConfig

if TYPE_CHECKING:
    from rich.table import Table

    from bdexport.bundle import Manifest

DEFAULT = BenchConfig()
ALL = "all"  # for --executor


def bench(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="BUNDLE folder.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="cifar10, cifar100, folder, digits, cifar10-samples. Default: what it was trained on."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits and samples need none).")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = DEFAULT.split,
    images: Annotated[int, typer.Option(min=1, help="The first N images, or all if there are fewer.")] = DEFAULT.images,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out image files that cannot be decoded, and list them.")
    ] = False,
    max_pixels: MaxPixels = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = DEFAULT.batch,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute one call. Default: the backend's choice.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to run. Default: the backend's.")] = None,
    executor: Annotated[
        str, typer.Option(help="How paths are run; auto: as measured at build time; all: each in turn.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls per batch.")] = DEFAULT.rounds,
    seconds: Annotated[
        float | None,
        typer.Option(help="Time for the timed calls: as many rounds as fit, at least one. Instead of --rounds."),
    ] = None,
    turn: Annotated[
        int, typer.Option(min=1, help="Timed calls of one side before it is the other's turn.")
    ] = DEFAULT.turn,
    verify_key: VerifyKey = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Latency, throughput, accuracy and block usage of dynamic inference against the full network, in turn."""
    from bdexport.bench import executors_result, measure_all
    from bdexport.bundle import read_manifest
    from bdexport.dataset import check_classes, check_folder, load_dataset, with_classes_of
    from bdexport.runtime import load
    from bdexport.runtime.orchestrator import executors_of

    if seconds is not None:
        refuse(context, ("rounds",), "with --seconds, which sets them")
    name = dataset or known_dataset(read_manifest(bundle, verify_key))
    check_folder(name, data)  # before a bundle is loaded
    every = executor == ALL
    opened = load(
        bundle,
        threads=threads,
        device=device,
        executor="auto" if every else executor,
        fused=every,
        verify_key=verify_key,
    )
    with opened as orchestrator, quiet_progress() as bar:
        refuse_threads(context, orchestrator.device)
        chosen = load_dataset(name, data, split, limit=images, skip_damaged=skip_damaged, max_pixels=max_pixels)
        show_skipped(chosen)
        chosen = with_classes_of(chosen, orchestrator.class_names)
        check_classes(chosen, len(orchestrator.class_names), orchestrator.class_names)
        sides = executors_of(orchestrator) if every else {orchestrator.executor: orchestrator}
        measurements = measure_all(
            sides,
            chosen.arrays(orchestrator.manifest.preprocess),
            chosen.labels,
            batch=min(batch, len(chosen)),
            rounds=rounds,
            warmup_batches=DEFAULT.warmup_batches,
            turn=turn,
            seconds=seconds,
            estimated=_announce,
            progress=updates(bar, "measuring, dynamic and full in turn"),
        )
        result = executors_result(sides, chosen, measurements, orchestrator.executor)
    if json is not None:  # before the tables, whose reader may have gone
        write_json_result(json, result)
    out = table_console(json)
    for line in _against_base(result, opened.manifest.training):
        out.print(line, soft_wrap=True)
    out.print(_table(result))
    if every:
        out.print(_executors(result))
    for line in _remarks(result, batch):
        out.print(line, soft_wrap=True)


def _against_base(result: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """What every accuracy below is to be held against: the base, not the network that training left."""
    from bdexport.base_figures import BaseFigures, points, was_trained

    if result["base"] is None:
        return (
            ["your base's accuracy is not on record: 'full' is the network after training"]
            if was_trained(training)
            else []
        )
    base = BaseFigures(**result["base"])
    if not base.here:
        return [base.sentence()]
    sides = ", ".join(
        f"{side} {result[side]['accuracy']:.2f} % ({points(result[side]['accuracy'], base.accuracy)})"
        for side in ("full", "dynamic")
    )
    return [f"your base ({base.name}): {base.accuracy:.2f} % of these images, {base.how}; {sides}"]


def known_dataset(manifest: Manifest) -> str:
    """The data set that the network was trained on, where its training says so; otherwise the usual one."""
    from bdexport.dataset import DATASETS

    recorded = manifest.training.get("dataset")
    name = recorded.get("name") if isinstance(recorded, dict) else None
    return str(name) if name in DATASETS else DEFAULT.dataset


def _announce(seconds: float, rounds: int) -> None:
    """Say what the timed calls will take, before they begin."""
    passes = f"{rounds} round{'s' * (rounds != 1)} over the images"
    err_console.print(f"measuring takes about {max(1, round(seconds))} s: {passes}")


def _table(result: dict[str, Any]) -> Table:
    full, dynamic, speedup = result["full"], result["dynamic"], result["speedup"]
    where = f"{result['dataset']['name']} {result['dataset']['split']}, {result['images']} images"
    how = f"batch {result['batch']}, {result['backend']} {result['precision']} on {result['device']}"
    threads = "" if result["threads"] is None else f", {result['threads']} thread{'s' * (result['threads'] != 1)}"
    table = FittedTable("", title=f"{result['architecture']}, {where}, {how}{threads}")
    for name in ("full", "dynamic", "gain"):
        table.add_column(name, justify="right")
    used, flops, blocks = dynamic["blocks_used"], dynamic["flops"], result["num_blocks"]
    points = dynamic["accuracy"] - full["accuracy"]
    table.add_row("accuracy", f"{full['accuracy']:.2f} %", f"{dynamic['accuracy']:.2f} %", f"{points:+.2f} points")
    table.add_row("blocks run", str(blocks), f"{used['mean']:.1f} +- {used['std']:.1f}", f"{used['mean'] / blocks:.0%}")
    table.add_row(
        "FLOPs", f"{full['flops']:.3e}", f"{flops['mean']:.3e} +- {flops['std']:.1e}", f"{speedup['flops']:.2f} x"
    )
    for name in ("mean", "p50", "p90", "p99"):
        times = full["latency_ms"][name], dynamic["latency_ms"][name]
        table.add_row(f"latency {name}", *(f"{time_ms:.3f} ms" for time_ms in times), f"{times[0] / times[1]:.2f} x")
    rates = full["throughput_per_s"], dynamic["throughput_per_s"]
    table.add_row("throughput", *(f"{rate:.1f} images/s" for rate in rates), f"{speedup['throughput']:.2f} x")
    return table


def _executors(result: dict[str, Any]) -> Table:
    table = FittedTable("executor", title="executors, in turn on the same images", expendable=("p90", "p99"))
    for name in ("mean", "p50", "p90", "p99", "images/s", "gain", "efficiency", "hits"):
        table.add_column(name, justify="right")
    full = result["full"]
    latencies = [f"{full['latency_ms'][name]:.3f} ms" for name in ("mean", "p50", "p90", "p99")]
    table.add_row("full", *latencies, f"{full['throughput_per_s']:.1f}", "1.00 x", "", "")
    for name, side in result["executors"].items():
        latencies = [f"{side['dynamic']['latency_ms'][key]:.3f} ms" for key in ("mean", "p50", "p90", "p99")]
        rate, gain = f"{side['dynamic']['throughput_per_s']:.1f}", f"{side['speedup']['latency_mean']:.2f} x"
        hits = "" if side["hit_rate"] is None else f"{100 * side['hit_rate']:.1f} %"
        mark = " (auto)" if name == result["executor"] else ""
        table.add_row(f"{name}{mark}", *latencies, rate, gain, f"{side['efficiency']:.2f}", hits)
    return table


def _remarks(result: dict[str, Any], batch: int) -> list[str]:
    """What the numbers are, and what they could be."""
    dynamic, measured, spread = result["dynamic"], result["measured"], result["spread"]
    machine = result["machine"]
    lines = [
        f"policy {dynamic['policy_ms']:.3f} ms; unique masks {dynamic['unique_masks']}; "
        f"efficiency {result['efficiency']:.2f} (ideal {result['ideal_ms']:.3f} ms: policy engine + full engine x "
        "share of its FLOPs)",
        f"executor {result['executor']} ({result['executor_reason']})"
        + ("" if result["hit_rate"] is None else f"; {100 * result['hit_rate']:.1f} % of the images were fused hits"),
        f"{measured['calls']} timed calls each, {measured['calls_per_turn']} at a turn, "
        f"after {measured['warmup_calls']} for warm-up; "
        f"standard deviation {spread['full']['std_ms']:.3f} / {spread['dynamic']['std_ms']:.3f} ms; "
        f"{measured['input']}",
        f"{machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items())),
    ]
    if result["fixed_mask"] is not None:
        lines.append(f"one mask for every image, without a policy network: {result['fixed_mask']}")
    if batch != result["batch"]:
        lines.append(f"batch {batch} is more than there are images: measured with {result['batch']}")
    elif measured["images_not_timed"]:
        lines.append(f"the last {measured['images_not_timed']} images fill no batch: they count for accuracy only")
    return lines
