"""The run's figures for TensorBoard, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdexport.files import is_utf8

EVENTS_FOLDER = "tensorboard"


class EventLog:
    """Writes each epoch's row under ``RUN/tensorboard``; does nothing without the ``tensorboard`` package.

    Nothing is written either where the folder's name is no UTF-8, which that package cannot open: ``note`` says so.

    ``writes``: of several processes, only one does. ``done`` epochs are in the log already; what a cut-off epoch may
    have left behind them is purged.
    """

    def __init__(self, run: Path, done: int, writes: bool = True) -> None:
        here = writes and importlib.util.find_spec("tensorboard") is not None
        readable = is_utf8(run.absolute())
        # What is left out although it could be expected, for a person.
        self.note = None if readable or not here else "no figures for TensorBoard: it opens no folder that is not UTF-8"
        self._writer: Any = None
        if here and readable:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / EVENTS_FOLDER), purge_step=done + 1)

    def add(self, row: dict[str, Any], step: int) -> None:
        """One epoch's figures; ``step`` counts the run's epochs from 1."""
        if self._writer is None:
            return
        for name, value in _scalars(row):
            self._writer.add_scalar(f"{row['phase']}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "epoch":
            yield f"{prefix}{name}", float(value)
