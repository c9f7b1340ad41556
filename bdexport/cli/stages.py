"""Progress of library calls that report ``(what, done, total)``, shown as one bar per stage."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import TaskID

from bdexport.cli.console import StageProgress

TITLES = {
    "load": "loading the checkpoint",
    "export": "exporting parts as ONNX",
    "engines": "building engines",
    "parts": "verifying parts",
    "paths": "verifying paths",
    "plots": "drawing plots",
}


def stages_of(bar: StageProgress) -> Callable[[str, int, int], None]:
    """A callback for ``bdexport.build`` and ``bdexport.export`` that moves the bars of ``bar``."""
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(TITLES.get(what, what), total=total)
        bar.update(tasks[what], completed=done, total=total)

    return report


def size_text(size: float) -> str:
    """``512 B``, ``13.2 kB``, ``4.0 MB``: decimal units."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
