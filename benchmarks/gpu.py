"""Dynamic inference on a GPU against the full network's engine: the latencies and throughputs that were promised.

    python benchmarks/gpu.py [--rounds 200] [--quick] [--backends torch onnxruntime tensorrt tensorrt-rtx]
                             [--workloads small batch all-kept large] [--json FILE]

Workloads, with random weights and random masks (time depends on neither), all contestants in turn in one process:

    small     ResNet-110, 32x32, batch 1, 17 of 54 blocks:   dynamic / full <= 0.45, efficiency >= 0.8
    batch     ResNet-110, 32x32, batch 256, 17 of 54 blocks: throughput >= 2.2 x full
    all-kept  ResNet-110, batch 1, every block, no policy:   dynamic / full <= 1.25
    large     ResNet-101, 224x224, batch 1, 25 of 33 blocks: efficiency >= 0.95

A call starts with float32 images on the host and ends with logits on the host. Dynamic calls run the policy, bring its
probabilities to the host and then follow the random mask. ``full`` is the best full-network call among the contestants
of the same backend. ``ideal`` is the share of the full network's FLOPs that policy and path have; efficiency is ideal
over the measured ratio. Contestants that this machine cannot run are skipped with the reason. The JSON is written after
each workload; ``large`` is the last, since building ResNet-101 takes longest. Prints a table last.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import (
    DEVICE,
    DRY_RUN,
    RESULTS,
    ResultFile,
    Skipped,
    in_turn,
    make_checkpoint,
    summary,
    what_is_missing,
)

import bdexport
from bdexport.bench.results import path_share
from bdexport.build import build_bundle
from bdexport.config import BuildConfig
from bdexport.parts import FULL, POLICY
from bdexport.report.benchmarks import LATENCY
from bdexport.runtime import Orchestrator

BACKENDS = ("torch", "onnxruntime", "tensorrt", "tensorrt-rtx")
EXECUTORS = ("chain", "graph")
DRY_BATCH = 4  # of images, in a dry run
MASKS = 16  # different masks of single images; a policy for CIFAR-10 repeats its masks as well


@dataclass(frozen=True)
class Workload:
    """What is measured, and what it has to reach: ``bound`` on ``criterion``, which is better when lower or not."""

    name: str
    arch: str
    batch: int
    kept: int
    targets: tuple[tuple[str, str, float], ...]  # (quantity, "<=" or ">=", bound)
    policy: bool = True


WORKLOADS = (
    Workload("small", "resnet110", 1, 17, (("ratio", "<=", 0.45), ("efficiency", ">=", 0.8))),
    Workload("batch", "resnet110", 256, 17, (("speedup", ">=", 2.2),)),
    Workload("all-kept", "resnet110", 1, 54, (("ratio", "<=", 1.25),), policy=False),
    Workload("large", "resnet101", 1, 25, (("efficiency", ">=", 0.95),)),
)


def main() -> None:
    arguments = _arguments()
    missing = what_is_missing()
    if missing is not None:
        sys.exit(f"gpu.py: no GPU can be used, nothing was measured: {missing}")
    rounds, warmup = (20, 5) if arguments.quick else (arguments.rounds, 20)
    if DRY_RUN:
        rounds, warmup = 2, 0
    skipped, results = Skipped(), []
    settings = {"rounds": rounds, "warmup": warmup, "backends": arguments.backends, "workloads": arguments.workloads}
    file = ResultFile(arguments.json, LATENCY, settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for workload in [_resized(workload) for workload in WORKLOADS if workload.name in arguments.workloads]:
            bundles = _bundles(workload, folder, arguments.backends, skipped)
            with skipped.unless_it_fails(workload.name):
                results += _measure(workload, bundles, rounds, warmup, skipped)
            file.write(results, skipped.reasons)
    file.write(results, skipped.reasons, complete=True)
    _print(results, skipped, arguments.json)
    if not results:
        sys.exit("gpu.py: no contestant could be run; the reasons are above")


def _resized(workload: Workload) -> Workload:
    return replace(workload, batch=min(workload.batch, DRY_BATCH)) if DRY_RUN else workload


# ---- contestants --------------------------------------------------------------------------------------------------


def _bundles(workload: Workload, folder: Path, backends: list[str], skipped: Skipped) -> dict[str, Path]:
    """The architecture's bundle by backend; built once for all workloads that use it."""
    bundles = {}
    checkpoint = folder / f"{workload.arch}.safetensors"
    if not checkpoint.exists():
        print(f"gpu.py: building {workload.arch} ...", file=sys.stderr)
        make_checkpoint(workload.arch, folder)
    for backend in backends:
        target = folder / f"{workload.arch}-{backend}"
        if target.exists():
            bundles[backend] = target
            continue
        if f"{workload.arch} {backend}" in skipped.reasons:
            continue
        with skipped.unless_it_fails(f"{workload.arch} {backend}"):
            # TensorRT's engines have a largest batch; the others take any.
            most = 256 if workload.arch == "resnet110" else 8
            config = BuildConfig(backend=backend, max_batch=most if backend.startswith("tensorrt") else None)
            bundles[backend] = build_bundle(checkpoint, target, config=config, cache_dir=folder / "cache").path
    return bundles


def _opened(
    workload: Workload, bundles: dict[str, Path], stack: ExitStack, skipped: Skipped
) -> dict[tuple[str, str], Orchestrator]:
    found = {}
    for backend, bundle in bundles.items():
        for executor in EXECUTORS:
            name = f"{workload.arch} {backend} {executor}"
            with skipped.unless_it_fails(name):
                orchestrator = stack.enter_context(bdexport.load(bundle, device=DEVICE, executor=executor))
                if "runs as chain" in orchestrator.executor_reason:
                    skipped.add(name, orchestrator.executor_reason)
                else:
                    found[backend, executor] = orchestrator
    return found


# ---- measuring ----------------------------------------------------------------------------------------------------


def _measure(
    workload: Workload, bundles: dict[str, Path], rounds: int, warmup: int, skipped: Skipped
) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        contestants = _opened(workload, bundles, stack, skipped)
        if not contestants:
            return []
        manifest = next(iter(contestants.values())).manifest
        rng = np.random.default_rng(0)
        images = rng.standard_normal((workload.batch, *manifest.parts[POLICY].input.shape), np.float32)
        masks = _random_masks(rng, workload, manifest.num_blocks)
        calls: dict[str, Callable[[int], object]] = {}
        for (backend, executor), orchestrator in contestants.items():
            pair = {
                "full": _full_call(orchestrator, images),
                "dynamic": _dynamic_call(orchestrator, images, masks, workload.policy),
            }
            with skipped.unless_it_fails(f"{workload.name} {backend} {executor}"):
                for call in pair.values():  # every mask once: first-time work and captures are not what is measured
                    for turn in range(len(masks)):
                        call(turn)
                calls |= {f"{backend}/{executor}/{side}": call for side, call in pair.items()}
        times = in_turn(calls, rounds, warmup)
        share = float(np.mean([path_share(mask, manifest).mean() for mask in masks]))
        if workload.policy:
            share += manifest.parts[POLICY].flops / manifest.parts[FULL].flops
        return [
            _row(workload, key, orchestrator, times, share)
            for key, orchestrator in contestants.items()
            if f"{'/'.join(key)}/full" in times
        ]


def _random_masks(rng: np.random.Generator, workload: Workload, num_blocks: int) -> list[np.ndarray]:
    """Masks (batch, K) with ``kept`` blocks each; a list of several for single images."""
    several = 2 if DRY_RUN else MASKS
    count = several if workload.batch == 1 and workload.kept < num_blocks else 1
    masks = np.zeros((count, workload.batch, num_blocks), bool)
    for mask in masks.reshape(-1, num_blocks):
        mask[rng.permutation(num_blocks)[: workload.kept]] = True
    return list(masks)


def _full_call(orchestrator: Orchestrator, images: np.ndarray) -> Callable[[int], object]:
    return lambda turn: orchestrator.full(images)


def _dynamic_call(
    orchestrator: Orchestrator, images: np.ndarray, masks: list[np.ndarray], policy: bool
) -> Callable[[int], object]:
    """The orchestrator's own steps; the policy's masks are computed and then not used."""

    def call(turn: int) -> object:
        mask = masks[turn % len(masks)]
        if not policy:
            return orchestrator(images, masks=mask)
        x = orchestrator.session.put(POLICY, orchestrator._inputs(images))
        orchestrator._decide(x)
        return orchestrator._run_blocks(x, mask)

    return call


def _row(
    workload: Workload,
    key: tuple[str, str],
    orchestrator: Orchestrator,
    times: dict[str, list[float]],
    ideal: float,
) -> dict[str, Any]:
    backend, executor = key
    own = {side: summary(times[f"{backend}/{executor}/{side}"]) for side in ("full", "dynamic")}
    fulls = [
        summary(values)["p50"]
        for name, values in times.items()
        if name.startswith(f"{backend}/") and name.endswith("/full")
    ]
    ratio = own["dynamic"]["p50"] / min(fulls)
    found = {"ratio": ratio, "speedup": 1 / ratio, "efficiency": ideal / ratio}
    targets = [
        {
            "quantity": name,
            "bound": f"{sign} {bound}",
            "met": found[name] <= bound if sign == "<=" else found[name] >= bound,
        }
        for name, sign, bound in workload.targets
    ]
    return {
        "workload": workload.name,
        "arch": workload.arch,
        "batch": workload.batch,
        "kept": workload.kept,
        "backend": backend,
        "executor": executor,
        "full_ms": own["full"],
        "best_full_ms": min(fulls),
        "dynamic_ms": own["dynamic"],
        "images_per_s": {side: workload.batch * 1e3 / values["p50"] for side, values in own.items()},
        "ideal": ideal,
        **found,
        "targets": targets,
        "notes": [*orchestrator.session.notes, orchestrator.executor_reason],
        "executor_report": orchestrator.executor_report(),
    }


# ---- output -------------------------------------------------------------------------------------------------------


def _print(results: list[dict[str, Any]], skipped: Skipped, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 140)  # rows in one line each, in a file or a log too
    for name, reason in skipped.reasons.items():
        console.print(f"skipped: {name}: {reason}", markup=False, highlight=False)
    table = Table(title=f"p50 in ms, host to host; JSON in {path}")
    for column in ("workload", "contestant"):
        table.add_column(column)
    for column in ("full", "dynamic", "ratio", "ideal", "efficiency", "targets"):
        table.add_column(column, justify="right")
    for row in results:
        judged = ", ".join(
            f"{item['quantity']} {item['bound']}: {'met' if item['met'] else 'MISSED'}" for item in row["targets"]
        )
        table.add_row(
            *(row["workload"], f"{row['backend']} {row['executor']}"),
            *(f"{row['full_ms']['p50']:.3f}", f"{row['dynamic_ms']['p50']:.3f}", f"{row['ratio']:.2f}"),
            *(f"{row['ideal']:.2f}", f"{row['efficiency']:.2f}", judged),
        )
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="20 rounds: a look, not a result")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path, default=RESULTS / "latency.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
