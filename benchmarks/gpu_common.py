"""What the GPU benchmarks share: is there a GPU, what does the machine have, result files, random weights, times.

With ``BDEXPORT_GPU_DRY_RUN=1`` the CPU stands in for the GPU, so that a script can be tried where there is none: what
it then writes is marked, and is no result.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bdexport.cuda import why_no_cuda
from bdexport.files import write_json
from bdexport.hardware import gpu_report, gpu_to_json, machine, package_versions
from bdexport.report.benchmarks import BENCHMARK_SCHEMA

PACKAGES = (
    *(
        "bdexport",
        "numpy",
        "torch",
        "onnx",
        "onnxruntime",
        "onnxruntime-gpu",
        "cuda-bindings",
        "cuda-core",
        "cuda-python",
    ),
    *("pycuda", "cupy-cuda13x", "cupy-cuda12x", "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13", "nvidia-cuda-nvrtc"),
)
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
MEASURED_CODE = ("bdexport/**/*.py", "benchmarks/*.py", "tests/gpu/*.py", "tests/*.py")
COMMIT, DRY_RUN_VARIABLE = "BDEXPORT_COMMIT", "BDEXPORT_GPU_DRY_RUN"
DRY_RUN = os.environ.get(DRY_RUN_VARIABLE) == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"


def what_is_missing() -> str | None:
    """In one line, why nothing can be measured here; None where there is a GPU."""
    error = why_no_cuda()
    if DRY_RUN or error is None or torch_cuda_reason() is None:
        return None
    return str(error)


def torch_cuda_reason() -> str | None:
    """Why torch cannot use a GPU here; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU"


class ResultFile:
    """One JSON file in the form of :mod:`bdexport.report.benchmarks`, written again whenever there is more.

    Until :meth:`write` says so, it is not complete: a script that is stopped leaves what it has. Nothing is written
    where ``path`` is None.
    """

    def __init__(
        self,
        path: Path | None,
        kind: str,
        settings: Mapping[str, Any],
        device: str = DEVICE,
        dry_run: bool = DRY_RUN,
    ) -> None:
        self.path = path
        self._head = {
            "schema": BENCHMARK_SCHEMA,
            "kind": kind,
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "code": code_digest(),
            "device": device,
            "dry_run": dry_run,
            "machine": machine(),
            "gpus": [] if device == "cpu" else gpus_now(),
            "versions": package_versions(PACKAGES) | {"python": sys.version.split()[0]},
            "settings": dict(settings),
        }
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write([])

    def write(
        self, results: list[dict[str, Any]], skipped: Mapping[str, str] | None = None, *, complete: bool = False
    ) -> None:
        """Replace the file, atomically. When it is complete, with the GPUs' clocks of then, which have been at work."""
        if complete and self._head["gpus"]:
            self._head["gpus"] = gpus_now()
        if self.path is not None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            rest = {"date": now, "complete": complete, "results": results, "skipped": dict(skipped or {})}
            write_json(self.path, self._head | rest)


def gpus_now() -> list[dict[str, Any]]:
    """The GPUs with their clocks of this moment."""
    return [gpu_to_json(gpu) for gpu in gpu_report().gpus]


def commit() -> str | None:
    """The commit that runs: ``BDEXPORT_COMMIT``, or what git says; None where neither does (a copy without .git)."""
    if given := os.environ.get(COMMIT):
        return given
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@cache
def code_digest() -> str:
    """SHA-256 over the code that is measured and that measures: the same in a copy without .git."""
    digest = hashlib.sha256()
    for pattern in MEASURED_CODE:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def make_checkpoint(arch: str, folder: Path) -> Path:
    """A checkpoint of random weights: time does not depend on them."""
    import torch

    from bdexport.architecture import policy_spec, resnet_spec
    from bdexport.checkpoint import Checkpoint, save_checkpoint
    from bdexport.models.pair import BlockDropNet
    from bdexport.preprocess import Preprocess

    torch.manual_seed(0)
    spec = resnet_spec(arch)
    model = BlockDropNet(spec).eval()
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    names = tuple(str(index) for index in range(spec.num_classes))
    path = folder / f"{arch}.safetensors"
    size = (spec.image_size, spec.image_size)
    save_checkpoint(path, Checkpoint(spec, policy_spec(spec), Preprocess(size), names, state))
    return path


def summary(seconds: list[float]) -> dict[str, float]:
    """Times in ms: percentiles, mean, least."""
    times = np.array(seconds) * 1e3
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return {"p50": p50, "p90": p90, "p99": p99, "mean": float(times.mean()), "min": float(times.min())}


def in_turn(calls: Mapping[str, Callable[[int], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Every call once per round, in reverse every other round; ``call(round)``; seconds. No garbage collection."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                begin = perf_counter()
                calls[name](turn)
                if turn >= 0:
                    times[name].append(perf_counter() - begin)
    finally:
        gc.enable()
    return times


class Skipped:
    """What was not measured, and why."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    @contextmanager
    def unless_it_fails(self, name: str) -> Iterator[None]:
        """A step that some machines cannot do: its failure is written down, and the rest goes on."""
        try:
            yield
        except Exception as error:  # whatever it is: it is printed and stored, and the other contestants still count
            self.add(name, f"{type(error).__name__}: {error}")

    def add(self, name: str, reason: str) -> None:
        """Write down a reason, in one line."""
        self.reasons[name] = " ".join(reason.split())[:400]
