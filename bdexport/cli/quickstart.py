"""``bdexport quickstart``: the whole way on data that ships with a dependency, as the commands one would type."""

from __future__ import annotations

import json as json_text
import shlex
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.app import run_line
from bdexport.cli.console import STDOUT, table_console, write_json_result
from bdexport.config import PRESETS, QuickstartConfig

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT = QuickstartConfig()
DATASET, RESULT = "digits", "result.json"


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
    write_json_result(out / RESULT, result)
    table_console(json).print(_table(result))
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
    """What the steps left in ``out``, as one JSON object; ``seconds`` is what this call took."""
    bench = json_text.loads((out / "bench.json").read_text())
    return {
        "schema": "bdexport.quickstart/1",
        "seconds": round(seconds, 1),
        "run": out / "run",
        "bundle": out / "bundle",
        "verify": json_text.loads((out / "verify.json").read_text()),
        "bench": bench,
    }


def _step(line: list[str], json: str | None) -> None:
    """Run one command in this process, exactly as if it had been typed; its failure is the quickstart's."""
    table_console(json).print(f"\n$ bdexport {shlex.join(line)}", style="bold", soft_wrap=True)
    with redirect_stdout(sys.stderr) if json == STDOUT else nullcontext():
        code = run_line(line)
    if code:
        raise typer.Exit(code)


def _table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    bench, verified, out = result["bench"], result["verify"], result["bundle"].parent
    full, dynamic = bench["full"], bench["dynamic"]
    used, blocks = dynamic["blocks_used"], bench["num_blocks"]
    table = Table(title=f"quickstart: {bench['architecture']} on {DATASET}", show_header=False)
    rows = {
        "mean latency, batch 1": f"{dynamic['latency_ms']['mean']:.3f} ms against {full['latency_ms']['mean']:.3f} ms "
        f"of the full network: {bench['speedup']['latency_mean']:.2f} x",
        "accuracy": f"{dynamic['accuracy']:.2f} % against {full['accuracy']:.2f} %, {bench['images']} held-out images",
        "blocks run": f"{used['mean']:.1f} +- {used['std']:.1f} of {blocks} ({used['mean'] / blocks:.0%}), "
        f"{dynamic['unique_masks']} unique masks",
        "verified": f"largest logit difference {verified['max_logit_difference']:.1e}",
        "trained network": str(result["run"]),
        "bundle": str(result["bundle"]),
        "result as JSON": str(out / RESULT),
        "took": f"{result['seconds']:.0f} s",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table
