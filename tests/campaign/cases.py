"""What a case is, what may come of it, and what a kind of case must provide."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from bdexport.cli.failures import explain
from bdexport.errors import BdexportError
from bdexport.files import CONTROLS

LONGEST_LINE = 6000  # characters of an error: more fills a screen


@dataclass
class Tally:
    """What one case found. ``refused``: refused with a clean error; ``right``: accepted, and the result is right."""

    refused: int = 0
    right: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """Number of things that were tried."""
        return self.refused + self.right + len(self.failures)

    def check(self, holds: bool, what: str) -> None:
        """Count one result that is right, or the failure ``what``."""
        if holds:
            self.right += 1
        else:
            self.failures.append(what)


class Kind(ABC):
    """One kind of case. A worker makes it once, on a folder that outlives the worker; cases must not change it."""

    name: ClassVar[str]
    about: ClassVar[str]  # for the table
    share: ClassVar[float]  # of the campaign's time
    limit_s: ClassVar[float] = 30.0  # for one case: longer is a hang
    memory_mb: ClassVar[int | None] = None  # what one case may add to the process's memory

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def case(self, random: Random, scratch: Path) -> Tally:
        """Run one case, drawn from ``random``, in the empty folder ``scratch``."""


@contextmanager
def once(folder: Path) -> Iterator[Path | None]:
    """Give a folder to fill if an earlier worker has not filled ``folder`` already, otherwise None."""
    if folder.exists():
        yield None
        return
    making = folder.with_name(f"{folder.name}.making-{time.monotonic_ns()}")
    making.mkdir(parents=True)
    yield making
    making.rename(folder)


def attempt(tally: Tally, what: str, call: Callable[[], Any]) -> Any:
    """The call's result; None where it was refused, which is counted here. Any other exception goes on to the worker.

    A refusal, as ``bdexport`` prints it, must be one clean line: no control characters, not empty, no screenful.
    """
    try:
        return call()
    except BdexportError as error:
        text, _ = explain(error)
        if not text or len(text) > LONGEST_LINE or CONTROLS.search(text) or "\n" in text:
            shown = f"{(text or '')[:200]!r} ({len(text or '')} characters)"
            tally.failures.append(f"{what}: refused with an unclean text {shown}")
        else:
            tally.refused += 1
        return None
