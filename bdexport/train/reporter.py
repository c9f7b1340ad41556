"""Where a run's progress goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Reporter(Protocol):
    """Where progress goes; the command line draws it, a library caller may ignore it."""

    def epoch(self, title: str, steps: int) -> AbstractContextManager[Callable[[], None]]:
        """Around one epoch; the yielded function is called after every step."""

    def line(self, row: dict[str, Any]) -> None:
        """One finished epoch."""

    def note(self, text: str) -> None:
        """A choice with its reason, or a warning."""
