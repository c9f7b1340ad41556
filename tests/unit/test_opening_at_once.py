"""Bundles that are opened while others do the same, or while another bundle takes their place.

In the latter case exactly one of the two is loaded, or none.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle, pixels, some_masks
from numpy.typing import NDArray
from tiny import tiny_model

import bdexport
from bdexport import files
from bdexport.backends import get_backend
from bdexport.backends.null import NullBackend
from bdexport.bundle import Bundle, open_bundle
from bdexport.errors import BundleError
from bdexport.runtime import orchestrator as orchestrator_module

LONG = pytest.mark.long
RACE_S = 1.0
THREADS = 16
LIMIT_S = 100  # a thread that hangs would hang for ever
IMAGES, MASKS = pixels(3), some_masks(3, 3)
REPLACED = r"was replaced meanwhile .*; load it again"

# Exchanges two folders again and again, in a process of its own: as fast as `build --overwrite` could at most.
EXCHANGING = """
import random, sys, time
from pathlib import Path
from bdexport import files
from bdexport.backends import get_backend

one, other = map(Path, sys.argv[1:])
print(files._exchange(one, other), flush=True)
random.seed(0)
while True:
    files._exchange(one, other)
    time.sleep(random.random() * 0.02)
"""

AT_ONCE = """
import sys, threading
import numpy as np
import bdexport
from concurrent.futures import ThreadPoolExecutor

number, together = int(sys.argv[2]), threading.Barrier(int(sys.argv[2]))

def answer(_):
    together.wait()
    with bdexport.load(sys.argv[1], threads=1) as loaded:
        return loaded.full(np.zeros((1, 24, 32, 3), np.uint8)).logits

with ThreadPoolExecutor(number) as pool:
    logits = list(pool.map(answer, range(number)))
print(all(np.array_equal(one, logits[0]) for one in logits), len(logits))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Two bundles of equal shapes and other weights, by the name of their backend."""
    made: dict[str, tuple[Path, Path]] = {}

    def bundles(backend: str) -> tuple[Path, Path]:
        if backend not in made:
            folder = tmp_path_factory.mktemp(backend)
            named: Any = NullBackend() if backend == "null" else backend
            one, other = (make_bundle(folder / name, tiny_model(seed=seed), named) for seed, name in enumerate("ab"))
            made[backend] = one.path, other.path
        return made[backend]

    return bundles


def answers(path: Path | Bundle) -> list[NDArray[np.float32]]:
    """What every part of a bundle has a share in: probabilities, logits of paths, and those of the full network."""
    with bdexport.load(path, threads=1) as loaded:
        result = loaded(IMAGES)
        assert result.probabilities is not None
        return [result.probabilities, result.logits, loaded(IMAGES, masks=MASKS).logits, loaded.full(IMAGES).logits]


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders; skips the test where the system cannot do that in one step."""
    if not files._exchange(one, other):
        pytest.skip("this system cannot exchange two names")


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("openvino", marks=LONG), pytest.param("torch", marks=LONG)]
)
def test_two_bundles_are_never_mixed(pair: Callable[[str], tuple[Path, Path]], backend: str) -> None:
    """Oracle: the answers of each bundle alone, while another process exchanges the two all the time."""
    paths = pair(backend)
    exchange(*paths)  # or skip
    expected = [answers(path) for path in paths]
    found: Counter[str] = Counter()
    with subprocess.Popen([sys.executable, "-c", EXCHANGING, *map(str, paths)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"True\n"
            end = time.monotonic() + RACE_S
            while time.monotonic() < end:
                try:
                    got = answers(paths[0])
                except BundleError:
                    found["refused"] += 1
                    continue
                fits = [all(map(close, got, alone)) for alone in expected]
                found["mixed" if not any(fits) else "ab"[fits.index(True)]] += 1
        finally:
            other.kill()
    assert found.total() > 0
    assert found["mixed"] == 0, found


def close(got: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    return bool(np.allclose(got, expected, atol=1e-5))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "null", pytest.param("torch", marks=LONG)])
def test_replaced_between_checking_and_reading(
    pair: Callable[[str], tuple[Path, Path]], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the refusal. Every file of both bundles is what its own manifest says, and so passes any check alone."""
    one, other = pair(backend)

    def exchanged(name: str) -> Any:
        exchange(one, other)
        return get_backend(name)

    monkeypatch.setattr(orchestrator_module, "get_backend", exchanged)
    with pytest.raises(BundleError, match=REPLACED) as caught:
        bdexport.load(one)
    assert str(one) in str(caught.value)


def test_replaced_after_the_engines_were_read(
    pair: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the refusal: what has just been loaded is not what stands at that path."""
    one, other = pair("null")
    opened = NullBackend.open

    def exchanged(self: NullBackend, *arguments: Any) -> Any:
        session = opened(self, *arguments)
        exchange(one, other)
        return session

    monkeypatch.setattr(NullBackend, "open", exchanged)
    with pytest.raises(BundleError, match=REPLACED):
        bdexport.load(one)


def test_a_volume_whose_link_moves_on(pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Oracle: the refusal: a Kubernetes volume is brought up to date by one link, while its folder stays the same."""
    one, other = pair("onnxruntime")
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "..data").symlink_to(one)
    for entry in one.iterdir():
        (volume / entry.name).symlink_to(Path("..data") / entry.name)
    opened = open_bundle(volume)
    assert all(map(close, answers(opened), answers(one)))
    (volume / "..new").symlink_to(other)
    (volume / "..new").replace(volume / "..data")
    with pytest.raises(BundleError, match=REPLACED):
        bdexport.load(opened)
    assert all(map(close, answers(volume), answers(other)))


def test_an_engine_that_is_written_to_in_place(tmp_path: Path) -> None:
    """Oracle: the refusal, although file, size and folder are the same as when the bundle was opened."""
    bundle = open_bundle(make_bundle(tmp_path / "bundle", tiny_model()).path)
    with open(bundle.engine("head"), "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(BundleError, match=REPLACED):
        bdexport.load(bundle)


def test_a_bundle_that_goes_away(tmp_path: Path) -> None:
    """Oracle: an error of ours, whichever step the folder goes before."""
    bundle = open_bundle(make_bundle(tmp_path / "bundle", tiny_model(), NullBackend()).path)
    bundle.path.rename(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=REPLACED):
        bdexport.load(bundle)
    with pytest.raises(BundleError, match=REPLACED):
        bundle.check_in_place()
    with pytest.raises(BundleError, match="no such bundle"):
        open_bundle(bundle.path)


# ---- first loads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_first_loads_at_once(pair: Callable[[str], tuple[Path, Path]], backend: str) -> None:
    """Oracle: the logits of sixteen threads, which load the first bundle of a fresh process at the same time."""
    words = [sys.executable, "-W", "error", "-c", AT_ONCE, str(pair(backend)[0]), str(THREADS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.stderr == ""
    assert done.stdout == f"True {THREADS}\n"
