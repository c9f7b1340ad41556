"""Cases that fail in every way that the campaign must notice, one way for each number that is drawn."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random
from typing import ClassVar

from bdexport.errors import InputError
from campaign.cases import Kind, Tally, attempt
from campaign.mutations import CANARY

WAYS = ("right", "refused", "wrong", "traceback", "hang", "death", "memory", "code")


class SelfTest(Kind):
    """The way is drawn, as the files of real cases are."""

    name: ClassVar[str] = "selftest"
    about: ClassVar[str] = "every way to fail"
    share: ClassVar[float] = 1
    limit_s: ClassVar[float] = 2.0
    memory_mb: ClassVar[int | None] = 60

    def case(self, random: Random, scratch: Path) -> Tally:
        """Do what is drawn."""
        tally = Tally()
        match random.choice(WAYS):
            case "right":
                tally.check(scratch.is_dir(), "no folder")
            case "refused":
                attempt(tally, "file", lambda: _raise(InputError("file: damaged")))
            case "wrong":
                tally.check(False, "wrong: other logits")
            case "traceback":
                _raise(ValueError("traceback"))
            case "hang":
                time.sleep(60)
            case "death":
                os.abort()
            case "memory":
                tally.right += len(bytearray(os.urandom(1) * (120 << 20))) > 0
            case "code":
                Path(os.environ[CANARY]).touch()
        return tally


def _raise(error: Exception) -> None:
    raise error
