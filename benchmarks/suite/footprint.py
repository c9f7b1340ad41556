"""Load time and memory of a bundle, and of the full network's session alone: each in a fresh process.

    python -m benchmarks.suite.footprint bundle|full BUNDLE THREADS        prints one JSON object

In the process, one after another: import the backend, load, one call with every block kept, prepare every fused path
(nothing for "full"). Times in s, memory in MB (10^6 bytes): ``rss_imported``, ``rss_loaded``, ``rss_run``,
``rss_prepared`` after each of them, and ``peak``. Neither torch nor onnx is imported. "full": ``full.onnx`` of the
bundle as one has it without bdexport, with the backend's own optimisations.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bdexport.bundle import Bundle, read_manifest
from bdexport.errors import BackendError
from bdexport.parts import FULL

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("full", "bundle")
TIMEOUT_S = 600


def footprints(bundle: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Medians of ``repeats`` processes of each kind, in turn, and bundle over full.

    Raises :class:`BackendError` with what the process said last.
    """
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            runs[kind].append(_in_process(kind, bundle, threads))
    medians = {kind: {key: median(run[key] for run in found) for key in found[0]} for kind, found in runs.items()}
    spread = {kind: [run["load_s"] for run in found] for kind, found in runs.items()}
    keys = ("load_s", "rss_loaded", "rss_run", "rss_prepared", "peak")
    ratios = {key: medians["bundle"][key] / medians["full"][key] for key in keys}
    return {"repeats": repeats, "runs_load_s": spread, **medians, "ratio": ratios}


def _in_process(kind: str, bundle: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.suite.footprint", kind, str(bundle.resolve()), str(threads)]
    place = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=os.environ | {"PYTHONPATH": place}
    )
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BackendError(f"{kind} of {bundle}: its process ended with {result.returncode} ({said})")
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def measure(kind: str, path: Path, threads: int) -> dict[str, float]:
    """What this process takes to import, load and run once."""
    manifest = read_manifest(path)
    image = np.zeros((1, *manifest.parts[FULL].input.shape), np.float32)
    started = perf_counter()
    _import_backend(manifest.backend)
    imported, rss_imported = perf_counter(), _rss()
    full = kind == "full"
    run, prepare = (_full_call(Bundle(path, manifest), threads), _nothing) if full else _bundle_calls(path, threads)
    loaded, rss_loaded = perf_counter(), _rss()
    run(image)
    ran, rss_run = perf_counter(), _rss()
    prepare()
    prepared = perf_counter()
    return {
        "import_s": imported - started,
        "load_s": loaded - imported,
        "first_call_s": ran - loaded,
        "rss_imported": rss_imported,
        "rss_loaded": rss_loaded,
        "rss_run": rss_run,
        "prepare_s": prepared - ran,
        "rss_prepared": _rss(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def _import_backend(backend: str) -> None:
    import bdexport.runtime  # noqa: F401

    if backend == "openvino":
        from bdexport.backends.openvino_common import core

        core()
    else:
        import onnxruntime  # noqa: F401


def _nothing() -> None:
    pass


def _bundle_calls(path: Path, threads: int) -> tuple[Callable[[Any], Any], Callable[[], None]]:
    import bdexport

    orchestrator = bdexport.load(path, threads=threads)
    every = np.ones((1, orchestrator.manifest.num_blocks), bool)

    def run(image: Any) -> None:
        orchestrator(image)
        orchestrator(image, masks=every)

    return run, orchestrator.prepare


def _full_call(bundle: Bundle, threads: int) -> Callable[[Any], Any]:
    graph, manifest = bundle.graph(FULL), bundle.manifest
    if manifest.backend == "openvino":
        from bdexport.backends.openvino_common import PRECISIONS, core

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[manifest.precision],
        }
        model = core().read_model(str(graph))
        model.reshape({0: [1, *manifest.parts[FULL].input.shape]})
        request = core().compile_model(model, "CPU", settings).create_infer_request()
        return lambda image: request.infer([image])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def _rss() -> float:
    """Resident memory of this process now, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
