"""Where the command line writes: results to stdout, progress and errors to stderr, JSON to a file or stdout.

Text is printed as it stands (no markup), since paths and hints such as ``bdexport[build]`` contain brackets; styles
are passed as ``style=``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeAlias

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
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
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from bdexport.files import utf8_text, without_controls, write_json

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

    @property
    def file(self) -> IO[str]:
        """Where to write: below every stream that would escape the colours and cursor movements of this console."""
        file: IO[str] = super().file
        while hasattr(file, "rich_proxied_file"):
            file = file.rich_proxied_file
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render_str(self, text: str, **settings: Any) -> Text:
        """As Rich's, for every text and every cell of a table; control characters become escapes before it is laid out.

        A terminal would obey them: names of files and classes may hold any.
        """
        return super().render_str(without_controls(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As Rich's; what did not pass through :meth:`render_str` is escaped here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(without_controls(segment.text), segment.style)


console = WideConsole(markup=False, highlight=False, emoji=False)
err_console = WideConsole(stderr=True, markup=False, highlight=False, emoji=False)


class FittedTable(Table):
    """A table that fits the terminal by showing fewer columns, never by cutting what stands in one.

    The columns named in ``expendable`` go first, in that order, then those at the end; a line below names them. The
    first column, which says what a row is about, always stays, and so does every column of a table without header,
    which could not be named. Numbers (columns that are justified to the right) keep to one line; text is wrapped
    between words, and within a word (a hash, a path) that would take more than a third of the terminal.
    """

    def __init__(self, *headers: Column | str, expendable: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*headers, **settings)
        self.expendable = tuple(expendable)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The columns that fit ``options.max_width``, then the names of the others."""
        room = [self._widths(console, options, index) for index in range(len(self.columns))]
        kept = self._kept([least for least, _ in room], options.max_width)
        widths = {index: room[index][0] for index in kept}
        spare = options.max_width - _table_width(widths.values())
        for index in kept:
            widths[index] += max(0, min(spare, room[index][1] - widths[index]))
            spare -= widths[index] - room[index][0]
        fitted = copy(self)
        fitted.columns = [
            replace(self.columns[index], _index=place, width=widths[index], overflow="fold")
            for place, index in enumerate(kept)
        ]
        yield from Table.__rich_console__(fitted, console, options)
        left_out = [str(column.header) for index, column in enumerate(self.columns) if index not in kept]
        if left_out:
            yield Text(f"left out at {options.max_width} columns: {', '.join(left_out)} (--json has them)")

    def _kept(self, least: list[int], width: int) -> list[int]:
        """The columns that are shown in ``width``, by index."""
        indices = range(1, len(self.columns))
        if not self.show_header:
            return [0, *indices]
        named = [index for name in self.expendable for index in indices if self.columns[index].header == name]
        order = [index for index in indices if index not in named] + named[::-1]  # the last one is the next to go
        while order and _table_width([least[0], *(least[index] for index in order)]) > width:
            order.pop()
        return sorted([0, *order])

    def _widths(self, console: Console, options: ConsoleOptions, index: int) -> tuple[int, int]:
        """The least and the natural width of a column, without its padding."""
        column = self.columns[index]
        cells = [Measurement.get(console, options, cell) for cell in column.cells]
        words = max((cell.minimum for cell in cells), default=0)
        natural = max((cell.maximum for cell in cells), default=0)
        header = Measurement.get(console, options, column.header) if self.show_header else Measurement(0, 0)
        whole = column.justify == "right" or (index == 0 and natural <= options.max_width // 2)
        if index > 0:
            words = min(words, options.max_width // 3 if self.show_header else 1)
        least = max(natural if whole else words, header.minimum, 1)
        fits = options.max_width - _table_width([0])  # a single column can be no wider: what is longer is folded
        return min(least, fits), min(max(natural, header.maximum, least), fits)


def _table_width(widths: Iterable[int]) -> int:
    """With a border and a blank on both sides of each column."""
    return 1 + sum(width + 3 for width in widths)


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
        return utf8_text(value.as_posix())
    if isinstance(value, str):
        return utf8_text(value)  # half of a surrogate pair, from a file name that is no UTF-8, is no JSON
    return value


def _is_stdout(json_target: JsonTarget | None) -> bool:
    return json_target is not None and str(json_target) == STDOUT
