"""What happens at the same time: a bundle is replaced while it is opened, closed while it is called, and so on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
from bundles import pixels

import bdexport
from bdexport.errors import BdexportError
from campaign.cases import Kind, Tally, attempt, once
from campaign.networks import backends, build, model_of

OPENINGS = 40
FIRST_LOADS = """
import sys, threading
import bdexport
from concurrent.futures import ThreadPoolExecutor
import numpy as np
path, count = sys.argv[1], int(sys.argv[2])
images = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
ready = threading.Barrier(count)
def run(_):
    ready.wait()
    with bdexport.load(path, threads=1) as orchestrator:
        return orchestrator(images).logits
with ThreadPoolExecutor(count) as pool:
    results = list(pool.map(run, range(count)))
expected = np.load(sys.argv[3])
assert all(np.array_equal(expected, each) for each in results)
"""


class Races(Kind):
    """Two bundles of one shape with different weights, for every backend."""

    name: ClassVar[str] = "races"
    about: ClassVar[str] = "replacing, closing, forking and first loading while others work"
    share: ClassVar[float] = 2
    limit_s: ClassVar[float] = 60.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images = pixels(4)
        with once(folder / "good") as making:
            if making is not None:
                for backend in backends():
                    for seed in (0, 1):
                        build(making / f"{backend}-{seed}", model_of(seed), backend, paths=2)
        self.expected = {}
        for backend in backends():
            for seed in (0, 1):
                with bdexport.load(self.good(backend, seed), threads=1) as orchestrator:
                    self.expected[backend, seed] = orchestrator(self.images).logits

    def good(self, backend: str, seed: int) -> Path:
        """The folder of one bundle."""
        return self.folder / "good" / f"{backend}-{seed}"

    def case(self, random: Random, scratch: Path) -> Tally:
        """One race of one backend."""
        backend = random.choice(backends())
        races: list[Callable[[Random, Path, str], Tally]] = [self.replace, self.close, self.fork, self.first_loads]
        return random.choices(races, (4, 3, 2, 1))[0](random, scratch, backend)

    def replace(self, random: Random, scratch: Path, backend: str) -> Tally:
        """Open a path over and over while two bundles take turns under it: each is one of the two, or refused."""
        how = random.choice((_rename, _copy_over, _link))
        path = scratch / "bundle"
        tally = Tally()
        with _meanwhile(lambda stop: how(path, [self.good(backend, seed) for seed in (0, 1)], stop, scratch)):
            for _ in range(OPENINGS):
                logits = attempt(tally, backend, lambda: self._logits(path))
                if logits is not None:
                    either = any(np.array_equal(logits, self.expected[backend, seed]) for seed in (0, 1))
                    tally.check(either, f"{backend}: a mixture of two bundles was opened ({how.__name__[1:]})")
        return tally

    def _logits(self, path: Path) -> Any:
        with bdexport.load(path, threads=1, fused=True) as orchestrator:
            return orchestrator(self.images).logits

    def close(self, random: Random, scratch: Path, backend: str) -> Tally:
        """Close an orchestrator at a random moment while four threads call it."""
        tally = Tally()
        expected = self.expected[backend, 0]
        with bdexport.load(self.good(backend, 0), threads=1) as orchestrator:

            def call(_: int) -> None:
                for _ in range(50):
                    try:
                        logits = orchestrator(self.images).logits
                    except BdexportError:
                        tally.refused += 1
                        return
                    tally.check(np.array_equal(logits, expected), f"{backend}: other logits while being closed")

            with ThreadPoolExecutor(4) as pool:
                waiting = pool.map(call, range(4))
                time.sleep(random.random() * 0.05)
                orchestrator.close()
                list(waiting)
        return tally

    def fork(self, random: Random, scratch: Path, backend: str) -> Tally:
        """Fork while a thread calls; the child uses the parent's orchestrator or one of its own, or is refused."""
        tally = Tally()
        anew = random.random() < 0.5
        with bdexport.load(self.good(backend, 0), threads=random.choice((1, 2))) as orchestrator:
            orchestrator(self.images)

            def busy(stop: threading.Event) -> None:
                while not stop.is_set():
                    orchestrator(self.images)

            with _meanwhile(busy):
                time.sleep(random.random() * 0.02)
                child = os.fork()
                if child == 0:
                    os._exit(self._child(orchestrator, backend, anew))
                code = _wait(child, 20.0)
        what = f"{backend}: the child that {'loads anew' if anew else 'calls what it inherited'}"
        if code == 3:
            tally.refused += 1
        else:
            tally.check(code == 0, f"{what} ended with {code}")
        return tally

    def _child(self, orchestrator: Any, backend: str, anew: bool) -> int:
        """Exit code in the child: 0 right, 1 wrong, 2 another exception, 3 refused."""
        try:
            logits = self._logits(self.good(backend, 0)) if anew else orchestrator(self.images).logits
        except BdexportError:
            return 3
        except BaseException:
            return 2
        return 0 if np.allclose(logits, self.expected[backend, 0], rtol=1e-5, atol=1e-5) else 1

    def first_loads(self, random: Random, scratch: Path, backend: str) -> Tally:
        """Many threads load for the first time in a new process."""
        count = random.choice((2, 8, 16))
        np.save(scratch / "expected.npy", self.expected[backend, 0])
        words = [sys.executable, "-c", FIRST_LOADS, str(self.good(backend, 0)), str(count)]
        words.append(str(scratch / "expected.npy"))
        done = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False)
        tally = Tally()
        tally.check(done.returncode == 0, f"{backend}: {count} first loads at once: {done.stderr[-300:]}")
        tally.right += (count - 1) * (done.returncode == 0)
        return tally


def _rename(path: Path, bundles: list[Path], stop: threading.Event, scratch: Path) -> None:
    """As ``build --overwrite`` does without the exchange: the old one is moved away, the new one takes its name."""
    number = 0
    while not stop.is_set():
        new, old = scratch / f"new{number}", scratch / f"old{number}"
        shutil.copytree(bundles[number % 2], new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        number += 1


def _copy_over(path: Path, bundles: list[Path], stop: threading.Event, _scratch: Path) -> None:
    """As ``cp -r`` and ``rsync --inplace`` do: file by file, under a bundle that is being opened."""
    number = 0
    while not stop.is_set():
        shutil.copytree(bundles[number % 2], path, dirs_exist_ok=True)
        number += 1


def _link(path: Path, bundles: list[Path], stop: threading.Event, scratch: Path) -> None:
    """A symbolic link that points to one bundle, then to the other."""
    number = 0
    while not stop.is_set():
        link = scratch / f"link{number % 2}"
        link.symlink_to(bundles[number % 2])
        os.replace(link, path)
        number += 1
        time.sleep(0.0005)


@contextmanager
def _meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run ``work`` in a thread until the block ends; an exception of the thread is raised there."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(work, stop)
        try:
            yield
        finally:
            stop.set()
        waiting.result()


def _wait(child: int, limit_s: float) -> int | str:
    """Exit code of a child process, which is killed at the limit."""
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"a hang of {limit_s:g} s"
