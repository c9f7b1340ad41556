"""``bdexport quickstart``: the whole way on data that ships with a dependency, as the commands one would type."""

from __future__ import annotations

import json as json_text
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bdexport.cli.console import STDOUT, err_console, table_console, write_json_result
from bdexport.config import PRESETS, QuickstartConfig

DEFAULT = QuickstartConfig()
DATASET = "digits"


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the run, the bundle and the results.")] = Path(
        "engines/quickstart"
    ),
    preset: Annotated[str, typer.Option(help=f"How long to train: {', '.join(PRESETS)}.")] = DEFAULT.preset,
    threads: Annotated[int, typer.Option(min=1, help="Threads to measure with.")] = DEFAULT.threads,
    json: Annotated[str | None, typer.Option(help="Also write the result to this file ('-': stdout).")] = None,
) -> None:
    """Train, build, verify and bench a small network on scikit-learn's digits; nothing is downloaded.

    Every step is shown as the command that it is. A quickstart that was cut off goes on where it was.
    """
    began = time.perf_counter()
    for line in command_lines(out, preset, threads):
        _step(line, json)
    result = summary(out, time.perf_counter() - began)
    _print_table(result, json)
    write_json_result(out / "result.json", result)
    if json is not None:
        write_json_result(json, result)


def command_lines(out: Path, preset: str, threads: int) -> list[list[str]]:
    """The commands, without the program's name, in order."""
    run, bundle = str(out / "run"), str(out / "bundle")
    settings = [word for setting in DEFAULT.settings for word in ("--set", setting)]
    measured = ["--dataset", DATASET, "--batch", "1", "--threads", str(threads)]
    return [
        ["train", "--arch", DEFAULT.arch, "--dataset", DATASET, "--preset", preset, *settings, "--out", run],
        ["build", run, "--out", bundle, "--overwrite"],
        ["verify", bundle, "--json", str(out / "verify.json")],
        ["bench", bundle, *measured, "--json", str(out / "bench.json")],
    ]


def summary(out: Path, seconds: float) -> dict[str, Any]:
    """What the steps left in ``out``, as one result."""
    from bdexport.bundle import read_manifest

    manifest = read_manifest(out / "bundle")
    bench = json_text.loads((out / "bench.json").read_text())
    verified = json_text.loads((out / "verify.json").read_text())
    return {
        "schema": "bdexport.quickstart/1",
        "architecture": manifest.architecture,
        "num_blocks": manifest.num_blocks,
        "seconds": round(seconds, 1),
        "run": out / "run",
        "bundle": out / "bundle",
        "verify": verified,
        "bench": bench,
    }


def _step(line: list[str], json: str | None) -> None:
    """Run one command in this process, exactly as if it had been typed; its failure is the quickstart's."""
    from contextlib import nullcontext, redirect_stdout

    from bdexport.cli.app import run_line

    table_console(json).print(f"\n$ bdexport {shlex.join(line)}", style="bold", soft_wrap=True)
    with redirect_stdout(err_console.file) if json == STDOUT else nullcontext():
        code = run_line(line)
    if code:
        raise typer.Exit(code)


def _print_table(result: dict[str, Any], json: str | None) -> None:
    from rich.table import Table

    bench, out = result["bench"], table_console(json)
    full, dynamic, speedup = bench["full"], bench["dynamic"], bench["speedup"]
    used, flops = dynamic["blocks_used"], dynamic["flops"]
    blocks = result["num_blocks"]
    table = Table(
        "", "full", "dynamic", "", title=f"{DEFAULT.arch} on {DATASET}, batch 1, {bench['threads']} thread(s)"
    )
    table.add_row("accuracy", f"{full['accuracy']:.2f} %", f"{dynamic['accuracy']:.2f} %", "")
    table.add_row("blocks run", str(blocks), f"{used['mean']:.1f} +- {used['std']:.1f}", f"{used['mean'] / blocks:.0%}")
    table.add_row("FLOPs", f"{full['flops']:.3e}", f"{flops['mean']:.3e}", f"{speedup['flops']:.2f} x fewer")
    table.add_row(
        "mean latency",
        f"{full['latency_ms']['mean']:.3f} ms",
        f"{dynamic['latency_ms']['mean']:.3f} ms",
        f"{speedup['latency_mean']:.2f} x faster",
    )
    out.print()
    out.print(table)
