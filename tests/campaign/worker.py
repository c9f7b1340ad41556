"""The process that runs the cases of one kind: ``python -m campaign.worker KIND FOLDER [SECONDS]``.

It reads ``SEED NUMBER`` lines and answers each with one line of JSON. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from campaign.cases import Kind, Tally
from campaign.memory import peak_mb, reset_peak, status_kb
from campaign.mutations import CANARY

SPARE_ADDRESSES = 6 << 30  # bytes of address space that a case with a memory limit has: a runaway ends in an error


def main() -> None:
    """Serve cases until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    from campaign.kinds import kind_of

    folder.mkdir(parents=True, exist_ok=True)
    canary = folder / "foreign-code-ran"
    canary.unlink(missing_ok=True)
    os.environ[CANARY] = str(canary)
    kind = kind_of(name)(folder)
    if kind.memory_mb is not None:
        limit = status_kb("VmSize") * 1024 + SPARE_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        seed, number = line.split()
        print(json.dumps(run_case(kind, seed, number, canary)), file=answers)


def run_case(kind: Kind, seed: str, number: str, canary: Path) -> dict[str, Any]:
    """Run one case; failures are its own, an exception, foreign code that ran, or more memory than it may take."""
    scratch = kind.folder / f"case-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    before = reset_peak()
    started = time.monotonic()
    tally = _guarded(lambda: kind.case(Random(f"{kind.name} {seed} {number}"), scratch))
    seconds = time.monotonic() - started
    grown_mb = max(0.0, peak_mb() - before)
    if canary.exists():
        canary.unlink()
        tally.failures.append("foreign code ran")
    if kind.memory_mb is not None and grown_mb > kind.memory_mb:
        tally.failures.append(f"memory: {grown_mb:.0f} MB, at most {kind.memory_mb} MB are allowed")
    shutil.rmtree(scratch, ignore_errors=True)
    return {
        "refused": tally.refused,
        "right": tally.right,
        "failures": tally.failures,
        "seconds": seconds,
        "grown_mb": grown_mb,
    }


def _guarded(call: Callable[[], Tally]) -> Tally:
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a refusal is an error of ours; everything else is a traceback for the user
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))
        return Tally(failures=[f"{type(error).__name__}: {str(error)[:300]} ({where})"])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner ends its workers
    main()
