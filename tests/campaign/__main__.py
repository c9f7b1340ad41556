"""``python -m campaign``: run it, print one table, write JSON. Exits with 1 where anything failed."""

from __future__ import annotations

import argparse
import datetime
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bdexport.files import check_writable, write_json
from bdexport.hardware import machine, package_versions
from campaign.kinds import KINDS, SELF_TEST, kind_of
from campaign.runner import Findings, Worker, collect, run_kinds

SCHEMA = "bdexport.campaign/1"
INTERRUPTED, MOST_MINUTES = 130, 10_000
PACKAGES = ("bdexport", "numpy", "pillow", "onnx", "onnxruntime", "openvino", "torch", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign, or one case of it; returns the exit code."""
    wanted = _parsed(argv)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="bdexport-campaign-") as scratch:
        folder = Path(wanted.keep or scratch)
        found = [_replayed(wanted.replay, folder)] if wanted.replay else _run(wanted, folder, console)
    Console().print(table_of(found))
    for each in found:
        for failure in each.failures[:5]:
            print(f"{each.kind} {failure['case']}: {failure['what']}\n    {failure['again']}")
    if wanted.json is not None:
        write_json(wanted.json, report_of(found, wanted))
        console.print(f"written: {wanted.json}")
    if any(each.interrupted for each in found):
        return INTERRUPTED
    return int(any(each.failures for each in found))


def table_of(found: Sequence[Findings]) -> Table:
    """One row per kind."""
    table = Table(title="Campaign: tried, refused, accepted and right, failed")
    table.add_column("kind")
    for heading in ("tried", "refused", "right", "failed", "slowest s", "memory MB"):
        table.add_column(heading, justify="right")
    for each in found:
        figures = (each.tried, each.refused, each.right, len(each.failures))
        numbers = [f"{figure:,}" for figure in figures]
        table.add_row(escape(each.kind), *numbers, f"{each.slowest_s:.1f}", f"{each.most_mb:.0f}")
    return table


def report_of(found: Sequence[Findings], wanted: argparse.Namespace) -> dict[str, Any]:
    """Everything as plain JSON: figures by kind, failures with what runs them again, versions and the machine."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "campaign", *wanted.words]),
        "seed": wanted.seed,
        "minutes": wanted.minutes,
        "interrupted": any(each.interrupted for each in found),
        "machine": machine(),
        "packages": package_versions(PACKAGES),
        "kinds": [
            {
                "kind": each.kind,
                "about": kind_of(each.kind).about,
                "cases": each.cases,
                "tried": each.tried,
                "refused": each.refused,
                "right": each.right,
                "failed": len(each.failures),
                "limit_s": kind_of(each.kind).limit_s,
                "slowest_s": round(each.slowest_s, 2),
                "most_mb": round(each.most_mb, 1),
                "memory_limit_mb": kind_of(each.kind).memory_mb,
                "seconds": round(each.seconds, 1),
                "failures": each.failures,
            }
            for each in found
        ],
    }


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("--minutes", type=_minutes, default=20.0, help="time for all kinds together (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="cases are drawn from it (default 1)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="only these")
    parser.add_argument("--json", type=Path, help="write the figures and the failures to this file")
    parser.add_argument("--keep", type=_folder, help="work in this folder and keep it")
    parser.add_argument("--replay", nargs=3, metavar=("KIND", "SEED", "NUMBER"), help="run one case again")
    words = sys.argv[1:] if argv is None else list(argv)
    wanted = parser.parse_args(words)
    wanted.words = words
    if wanted.replay:
        name, *numbers = wanted.replay
        if name not in (*KINDS, SELF_TEST):
            parser.error(f"kind {name!r}: expected one of {', '.join(KINDS)}")
        if not all(number.isdecimal() for number in numbers):
            parser.error(f"seed and number: got {' '.join(numbers)}, expected whole numbers")
    if wanted.json is not None:
        check_writable(wanted.json)  # before the work, not after
    return wanted


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 and at most {MOST_MINUTES}")
    return minutes


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is no folder")
    return path


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _replayed(words: Sequence[str], folder: Path) -> Findings:
    name, seed, number = words
    found, worker = Findings(name), Worker(name, folder / name)
    try:
        collect(found, worker, kind_of(name), int(seed), int(number))
    finally:
        worker.close()
    return found


def _run(wanted: argparse.Namespace, folder: Path, console: Console) -> list[Findings]:
    columns = (TextColumn("{task.description:12}"), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        rows = {name: progress.add_task(name, total=None, state="waits") for name in wanted.kinds}

        def tell(found: Findings) -> None:
            progress.update(rows[found.kind], state=f"{found.tried:,} tried, {len(found.failures)} failed")

        return run_kinds(wanted.kinds, wanted.seed, wanted.minutes, folder, tell)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # workers are ended, and what was found is written
    sys.exit(main())
