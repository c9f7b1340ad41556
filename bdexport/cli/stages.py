"""Progress of library calls that report ``(what, done, total)``, shown as one bar per stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import TaskID

from bdexport.cli.console import StageProgress, err_console, progress

if TYPE_CHECKING:
    from bdexport.dataset import Dataset

SECONDS_BETWEEN_UPDATES = 0.5
TITLES = {
    "load": "loading the checkpoint",
    "export": "exporting parts as ONNX",
    "calibrate": "gathering scales",
    "engines": "building engines",
    "masks": "counting masks",
    "targets": "running masks to choose from",
    "executors": "trying executors",
    "parts": "verifying parts",
    "paths": "verifying paths",
    "plots": "drawing plots",
}


def stages_of(bar: StageProgress) -> Callable[[str, float, int], None]:
    """A callback for ``bdexport.build`` and ``bdexport.export`` that moves the bars of ``bar``."""
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: float, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(TITLES.get(what, what), total=total)
        bar.update(tasks[what], completed=done, total=total)

    return report


def show_skipped(dataset: Dataset) -> None:
    """A line on stderr for every damaged image that was left out."""
    for reason in dataset.skipped:
        err_console.print(f"skipped: {reason}", soft_wrap=True)
    if dataset.skipped:
        counts = f"{len(dataset.skipped)} skipped, {len(dataset)} left"
        err_console.print(f"damaged images of the {dataset.split} split: {counts}")


def size_text(size: float) -> str:
    """``512 B``, ``13.2 kB``, ``4.0 MB``: decimal units."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def quiet_progress() -> StageProgress:
    """A bar without a thread of its own, which would take time from what is being measured."""
    bar = progress()
    bar.live.auto_refresh = False
    return bar


def updates(bar: StageProgress, title: str) -> Callable[[int, int], None]:
    """A callback ``(done, total)`` that redraws ``bar`` twice a second, between two timed calls."""
    task = bar.add_task(title, total=None)
    drawn = 0.0

    def update(done: int, total: int) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn >= SECONDS_BETWEEN_UPDATES:
            drawn = now
            bar.update(task, completed=done, total=total)
            bar.refresh()

    return update
