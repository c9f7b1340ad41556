"""What is made once in a process: by several threads at once, and beside a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bdexport.backends.first_use import once

THREADS = 16
LIMIT_S = 100  # a thread that hangs would hang for ever


def test_all_threads_get_what_was_made_once() -> None:
    """Oracle: the number of calls; a call that fails is made again."""
    made: list[str] = []
    together = threading.Barrier(THREADS)

    @once
    def make(what: str) -> object:
        made.append(what)
        if len(made) == 1:
            raise ImportError("not yet")
        return object()

    with pytest.raises(ImportError, match="not yet"):
        make("it")

    def get(_: int) -> object:
        together.wait()
        return make("it")

    with ThreadPoolExecutor(THREADS) as pool:
        found = set(pool.map(get, range(THREADS)))
    assert len(found) == 1
    assert made == ["it"] * 2
    assert make("other") not in found


FORKING = """
import os, sys, threading, time, warnings
from bdexport.backends.first_use import once

warnings.simplefilter("ignore")  # of forks beside threads
inside = threading.Event()

@once
def slow():
    inside.set()
    time.sleep(0.3)
    return "made"

threading.Thread(target=slow).start()
inside.wait()
child = os.fork()
if child == 0:
    os._exit(0 if slow() == "made" else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_beside_a_first_use() -> None:
    """Oracle: the child's exit code: it gets what another thread was making, in place of waiting for that thread."""
    done = subprocess.run([sys.executable, "-c", FORKING], timeout=LIMIT_S, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
