"""A measurement as JSON: what was measured, on what, and what it means beside the ideal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport import __version__
from bdexport.backends import get_backend
from bdexport.base_figures import known_base
from bdexport.bench.measure import INPUT, Measurement, Series
from bdexport.bundle import Manifest
from bdexport.dataset import Dataset
from bdexport.hardware import machine, package_versions
from bdexport.parts import FULL, HEAD, POLICY, STEM, Masks, block_part, shortcut_part
from bdexport.runtime import Orchestrator

SCHEMA = "bdexport.bench/1"
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt")


def bench_result(orchestrator: Orchestrator, dataset: Dataset, measurement: Measurement) -> dict[str, Any]:
    """The result of ``bdexport bench`` as a JSON object.

    Latencies are per call, in ms, warm-up excluded; accuracies in percent; FLOPs per image, 2 x multiply-accumulates.
    ``efficiency``: what the dynamic call would take if the policy's engine and the path's share of the full engine's
    time were all, over what it takes.
    """
    manifest = orchestrator.manifest
    full, dynamic = measurement.full, measurement.dynamic
    flops, share = path_flops(dynamic.masks, manifest), path_share(dynamic.masks, manifest)
    full_flops = manifest.parts[FULL].flops
    ideal_ms = dynamic.policy_ms.mean() + full.network_ms.mean() * share.mean()
    used = dynamic.masks.sum(axis=1)
    full_latency, dynamic_latency = latency_summary(full.latency_ms), latency_summary(dynamic.latency_ms)
    full_rate, dynamic_rate = (_throughput(side, measurement.batch) for side in (full, dynamic))
    sha256, images = manifest.checkpoint["sha256"], len(dynamic.correct)
    fixed = manifest.extra.get("fixed_mask")
    base = known_base(manifest.training, sha256, dataset.name, dataset.split, images, fixed)
    return {
        "schema": SCHEMA,
        "bundle": orchestrator.bundle.path,
        "backend": manifest.backend,
        "executor": orchestrator.executor,
        "executor_reason": orchestrator.executor_reason,
        "hit_rate": orchestrator.hit_rate,
        "device": orchestrator.device,
        "threads": orchestrator.threads,
        "precision": manifest.precision,
        "batch": measurement.batch,
        "images": images,
        "base": None if base is None else base.to_json(),
        "versions": versions(manifest),
        "full": {
            "accuracy": _accuracy(full),
            "flops": full_flops,
            "latency_ms": full_latency,
            "throughput_per_s": full_rate,
        },
        "dynamic": {
            "accuracy": _accuracy(dynamic),
            "flops": {"mean": float(flops.mean()), "std": float(flops.std())},
            "blocks_used": {
                "mean": float(used.mean()),
                "std": float(used.std()),
                "min": int(used.min()),
                "max": int(used.max()),
            },
            "unique_masks": len(np.unique(dynamic.masks, axis=0)),
            "policy_ms": float(dynamic.policy_ms.mean()),
            "latency_ms": dynamic_latency,
            "throughput_per_s": dynamic_rate,
        },
        "speedup": {
            "latency_mean": full_latency["mean"] / dynamic_latency["mean"],
            "latency_p50": full_latency["p50"] / dynamic_latency["p50"],
            "throughput": dynamic_rate / full_rate,
            "flops": full_flops / float(flops.mean()),
        },
        "efficiency": float(ideal_ms / dynamic.latency_ms.mean()),
        "ideal_ms": float(ideal_ms),
        "spread": {"full": _spread(full), "dynamic": _spread(dynamic)},
        "dataset": {"name": dataset.name, "split": dataset.split, "skipped": dataset.skipped},
        "architecture": manifest.architecture,
        "num_blocks": manifest.num_blocks,
        "fixed_mask": fixed,
        "measured": {
            "input": INPUT,
            "rounds": measurement.rounds,
            "calls": len(dynamic.latency_ms),
            "warmup_calls": measurement.warmup_calls,
            "calls_per_turn": measurement.turn,
            "images_not_timed": measurement.images_not_timed,
        },
        "notes": list(orchestrator.session.notes),
        "machine": machine(),
    }


OF_EXECUTORS = ("executor_reason", "hit_rate", "dynamic", "speedup", "efficiency", "ideal_ms", "spread")


def executors_result(
    sides: Mapping[str, Orchestrator], dataset: Dataset, measurements: Mapping[str, Measurement], chosen: str
) -> dict[str, Any]:
    """:func:`bench_result` of the executor ``chosen``, and under ``executors`` what differs, of every one of them."""
    results = {name: bench_result(sides[name], dataset, measurement) for name, measurement in measurements.items()}
    executors = {name: {key: result[key] for key in OF_EXECUTORS} for name, result in results.items()}
    return results[chosen] | {"executors": executors}


def latency_summary(times_ms: NDArray[np.float64]) -> dict[str, float]:
    """Mean, median and tails of latencies in ms."""
    p50, p90, p99 = np.percentile(times_ms, (50, 90, 99)).tolist()
    return {"mean": float(times_ms.mean()), "p50": p50, "p90": p90, "p99": p99}


def path_flops(masks: Masks, manifest: Manifest) -> NDArray[np.float64]:
    """FLOPs of each image under its mask, policy included, (N,)."""
    return _network_flops(masks, manifest) + manifest.parts[POLICY].flops


def path_share(masks: Masks, manifest: Manifest) -> NDArray[np.float64]:
    """The share of the full network's FLOPs that each image's path runs, without the policy, (N,)."""
    return _network_flops(masks, manifest) / max(1, manifest.parts[FULL].flops)


def _network_flops(masks: Masks, manifest: Manifest) -> NDArray[np.float64]:
    parts = manifest.parts
    kept = np.array([parts[block_part(index)].flops for index in range(manifest.num_blocks)], np.float64)
    dropped = np.zeros_like(kept)
    for index in manifest.transitions:
        dropped[index] = parts[shortcut_part(index)].flops
    total: NDArray[np.float64] = np.where(masks, kept, dropped).sum(axis=1)
    return total + parts[STEM].flops + parts[HEAD].flops


def _accuracy(side: Series) -> float:
    return float(100.0 * side.correct.mean())


def _throughput(side: Series, batch: int) -> float:
    return float(batch * 1e3 / side.latency_ms.mean())


def _spread(side: Series) -> dict[str, float]:
    times = side.latency_ms
    return {"std_ms": float(times.std()), "min_ms": float(times.min()), "max_ms": float(times.max())}


def versions(manifest: Manifest) -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    own = {"bdexport": __version__, "python": machine()["python"]}
    return own | package_versions(PACKAGES) | dict(get_backend(manifest.backend).versions())
