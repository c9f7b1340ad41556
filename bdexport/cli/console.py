"""Where the command line writes: results to stdout, progress and errors to stderr, JSON to a file or stdout.

Text is printed as it stands (no markup), since paths and hints such as ``bdexport[build]`` contain brackets; styles
are passed as ``style=``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console, ConsoleDimensions
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bdexport.files import write_json

STDOUT = "-"  # ``--json -``
PIPED_WIDTH = 160  # columns: enough for every table of ours, so that nothing is cut off in a file

JsonTarget: TypeAlias = str | Path


class WideConsole(Console):
    """A console that keeps a person's terminal width, but never squeezes tables when it writes to a file or pipe."""

    @property
    def size(self) -> ConsoleDimensions:
        """The terminal's columns, or ``COLUMNS``, or :data:`PIPED_WIDTH` when nobody watches."""
        size = super().size
        if self.is_terminal or "COLUMNS" in os.environ:
            return size
        return ConsoleDimensions(PIPED_WIDTH, size.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


console = WideConsole(markup=False, highlight=False, emoji=False)
err_console = WideConsole(stderr=True, markup=False, highlight=False, emoji=False)


class StageProgress(Progress):
    """A progress bar for a person; one plain line per stage when stderr is no terminal."""

    def add_task(
        self, description: str, start: bool = True, total: float | None = 100.0, *args: Any, **kwargs: Any
    ) -> TaskID:
        """Begin a stage, as :meth:`rich.progress.Progress.add_task`."""
        if self.disable:
            err_console.print(description)
        return super().add_task(description, start, total, *args, **kwargs)


def progress() -> StageProgress:
    """A context manager for long work: ``with progress() as bar: stage = bar.add_task(text, total=n)``.

    The bar vanishes at the end. It lives on the terminal that results go to, if they do, so that
    ``console.print`` inside writes above it and not through it; on stderr otherwise.
    """
    shown_on = console if console.is_terminal and err_console.is_terminal else err_console
    columns: list[ProgressColumn] = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    return StageProgress(
        *columns,
        console=shown_on,
        transient=True,
        disable=not shown_on.is_terminal,
        # Redirection would send a piped stdout to the bar's stream.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


def table_console(json_target: JsonTarget | None) -> Console:
    """Where the table for a person goes: stdout, but stderr when stdout is taken by ``--json -``."""
    return err_console if _is_stdout(json_target) else console


def write_json_result(json_target: JsonTarget, data: dict[str, Any]) -> None:
    """Write a result as JSON: to a file (atomically), or to stdout for ``-``.

    ``data`` has a ``"schema"`` entry that names its form, e.g. ``bdexport.bench/1``. numpy's scalars and arrays,
    paths and tuples are converted; NaN and infinity become null, since JSON has neither. Raises OutputError when the
    file cannot be written.
    """
    assert "schema" in data, "every JSON result names its schema"
    plain = to_plain(data)
    if _is_stdout(json_target):
        sys.stdout.write(json.dumps(plain, indent=2, allow_nan=False) + "\n")
    else:
        write_json(Path(json_target), plain)


def to_plain(value: Any) -> Any:
    """``value`` with only dict, list, str, int, float, bool and None in it."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy, without importing it
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _is_stdout(json_target: JsonTarget | None) -> bool:
    return json_target is not None and str(json_target) == STDOUT
