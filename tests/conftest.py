"""What every test gets: one thread per library, a cache of its own, and the fixtures that several tests use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from gpu_report import pytest_runtest_makereport, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401 (hooks)

if TYPE_CHECKING:
    from bdexport.checkpoint import Checkpoint

# Read when the libraries are first imported, hence before any of them. The tests' networks are tiny: threads cost more
# than they bring, and pools of several test processes fight.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process that they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def cache_of_session_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is built once for many tests stays out of the user's cache as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDEXPORT_CACHE", str(tmp_path_factory.mktemp("session-cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test builds into an empty cache, and none touches the user's."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BDEXPORT_CACHE", str(cache))
    monkeypatch.delenv("BDEXPORT_DEBUG", raising=False)
    return cache


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that is tested."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with public checkpoints and real data, where there is one; tests that need it are skipped elsewhere."""
    folder = Path(os.environ.get("BDEXPORT_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "checkpoints").is_dir():
        pytest.skip(f"no folder with checkpoints and data at {folder}; set BDEXPORT_SHARED")
    return folder


@pytest.fixture(scope="session")
def digits_base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A network of three blocks, pretrained on digits, that training runs start from."""
    from training_cases import CONFIG, Recorder, request

    from bdexport.checkpoint import load_checkpoint
    from bdexport.train.pipeline import train

    out = tmp_path_factory.mktemp("digits-base") / "run"
    return load_checkpoint(train(request(out, base_only=True), CONFIG, Recorder()))
