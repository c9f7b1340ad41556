"""What the GPU benchmarks share: is there a GPU, what does the machine have, bundles of random weights, times."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bdexport.cuda import why_no_cuda
from bdexport.hardware import gpu_report, gpu_to_json, machine, package_versions

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
RESULTS = Path(__file__).parent / "results"


def what_is_missing() -> str | None:
    """In one line, why nothing can be measured here; None where there is a GPU."""
    error = why_no_cuda()
    if error is None or torch_cuda_reason() is None:
        return None
    return str(error)


def torch_cuda_reason() -> str | None:
    """Why torch cannot use a GPU here; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU"


def surroundings() -> dict[str, Any]:
    """Machine, GPUs with clocks, driver, versions: what numbers come from."""
    return {
        "machine": machine(),
        "gpus": [gpu_to_json(gpu) for gpu in gpu_report().gpus],
        "versions": package_versions(PACKAGES) | {"python": sys.version.split()[0]},
    }


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
