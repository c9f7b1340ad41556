"""A profile as JSON: where a call's time goes, part by part, and what bounds each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bdexport.backends import backend_class
from bdexport.bench.measure import INPUT, Times
from bdexport.bench.profiling import Alone, Call, Profile, bytes_moved
from bdexport.bench.results import latency_summary, versions
from bdexport.bench.timed_session import COPY, FUSED, PART, REGROUP, Event
from bdexport.bundle import Manifest, PartEntry
from bdexport.config import ProfileConfig
from bdexport.hardware import machine
from bdexport.parts import FULL, POLICY, mask_from_text, path_parts
from bdexport.runtime import Orchestrator

SCHEMA = "bdexport.profile/1"
LAUNCH, MEMORY, COMPUTE = "launch", "memory", "compute"
STAGES = {
    "preprocess": "checks and normalisation",
    "policy": "the policy's engine",
    "network": "the engines of stem, blocks, shortcuts and head",
    "copies": "into and out of the session's layout or device",
    "regrouping": "images gathered, written back, merged",
    "between": "the rest: deciding, planning, Python between the calls, the clocks themselves",
}


def profile_result(
    orchestrator: Orchestrator, measured: Profile, dataset: dict[str, str], config: ProfileConfig | None = None
) -> dict[str, Any]:
    """The result of ``bdexport profile`` as a JSON object. Times in ms, of the profiled side unless named otherwise.

    ``share``: how often times p50, of the sum of that over parts and stages: medians, since one interruption by
    another process may outweigh a hundred calls. ``gap_ms``: from the end of the part before to this part's beginning,
    copies and regrouping taken off, p50. ``gflops_per_s``: FLOPs (2 x multiply-accumulates) of a run's images over
    its time, p50. ``fused``: see :func:`_fused`; None where there are no fused paths to run.
    """
    config = config or ProfileConfig()
    manifest, calls = orchestrator.manifest, measured.calls
    computes = backend_class(manifest.backend).computes
    launch_ms = launch_cost_ms(measured.alone) if computes else None
    series = _series(calls, PART)
    parts = [
        _part_entry(entry, series.get(part, _Series()), measured.alone[part], launch_ms, config)
        for part, entry in manifest.parts.items()
        if part != FULL
    ]
    stages = _stages(calls)
    _add_shares(parts, stages, len(calls))
    fused = _fused(manifest, measured.fused_calls) if measured.fused_calls else None
    images = sum(len(call.masks) for call in calls)
    used = np.concatenate([call.masks for call in calls]).sum(axis=1)
    return {
        "schema": SCHEMA,
        "bundle": orchestrator.bundle.path,
        "architecture": manifest.architecture,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "executor": orchestrator.executor,
        "executor_reason": orchestrator.executor_reason,
        "device": orchestrator.device,
        "threads": orchestrator.threads,
        "batch": measured.batch,
        "images": images,
        "dataset": dataset,
        "num_blocks": manifest.num_blocks,
        "blocks_used": {"mean": float(used.mean()), "std": float(used.std())},
        "call_ms": latency_summary(_call_times(calls)),
        "stages": stages,
        "parts": parts,
        "verbs": _verbs(calls),
        "fused": fused,
        "full": _full_entry(manifest.parts[FULL], measured),
        "criterion": _criterion(launch_ms, orchestrator.device, computes, config),
        "instrumentation": _instrumentation(measured),
        "measured": {
            "input": INPUT,
            "rounds": measured.rounds,
            "calls": len(calls),
            "warmup_calls": measured.warmup_calls,
            "images_not_timed": measured.images_not_timed,
        },
        "versions": versions(manifest),
        "machine": machine(),
        "notes": _notes(orchestrator),
    }


# ---- parts -------------------------------------------------------------------------------------------------------


@dataclass
class _Series:
    """All runs of one part or fused path."""

    ms: list[float] = field(default_factory=list)
    gap_ms: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def _series(calls: Sequence[Call], kind: str) -> dict[str, _Series]:
    """By name. A gap is the time between two events of the kind that nothing else takes."""
    series: dict[str, _Series] = {}
    for call in calls:
        part_ended: int | None = None
        others_ns = 0
        for event in call.events:
            if event.kind != kind:
                others_ns += event.end_ns - event.begin_ns
                continue
            own = series.setdefault(event.what, _Series())
            own.ms.append(event.ms)
            own.rows.append(event.rows)
            if part_ended is not None:
                own.gap_ms.append((event.begin_ns - part_ended - others_ns) / 1e6)
            part_ended, others_ns = event.end_ns, 0
    return series


def _part_entry(
    entry: PartEntry, series: _Series, alone: Alone, launch_ms: float | None, config: ProfileConfig
) -> dict[str, Any]:
    """One part; the times are None where no image ran it."""
    times = _times_of(series, entry.flops)
    per_run = times["images_per_run"] or 1.0
    moved = bytes_moved(entry, per_run)
    return {
        "part": entry.name,
        **times,
        "gap_ms": float(np.median(series.gap_ms)) if series.gap_ms else None,
        "bytes_moved": moved,
        "flops_per_byte": entry.flops * per_run / moved,
        "alone_ms": alone.ms,
        "copy_ms": alone.copy_ms,
        "bound": bound_of(times["p50_ms"], launch_ms, alone.copy_ms, config.bound_share),
    }


def _times_of(series: _Series, flops: int) -> dict[str, Any]:
    """How often, how long and at what rate; ``flops`` of one image."""
    ran = len(series.ms) > 0
    times, rows = np.array(series.ms), np.array(series.rows)
    p50, p90 = np.percentile(times, (50, 90)).tolist() if ran else (None, None)
    return {
        "runs": len(times),
        "images": int(rows.sum()),
        "images_per_run": float(rows.mean()) if ran else None,
        "p50_ms": p50,
        "p90_ms": p90,
        "mean_ms": float(times.mean()) if ran else None,
        "flops": flops,
        "gflops_per_s": float(np.median(flops * rows / times)) / 1e6 if ran else None,
    }


def _fused(manifest: Manifest, calls: Sequence[Call]) -> dict[str, Any]:
    """The same images through the fused paths, a side of its own: its calls, stages, paths and hits.

    ``paths``: each path's mask and its runs, as those of a part; the mask that keeps every block runs the engine of
    ``full``. ``share``: as that of parts, of this side. ``missed``: images of every other mask, which run ``chain``.
    """
    assert manifest.fused is not None
    series, parts = _series(calls, FUSED), _series(calls, PART)
    whole = "1" * manifest.num_blocks
    if FULL in parts:
        series[whole] = parts.pop(FULL)
    entries = []
    for mask in [path.mask for path in manifest.fused.paths] + [whole] * (whole in series):
        run = path_parts(mask_from_text(mask, manifest.num_blocks).tolist(), manifest.transitions)
        flops = manifest.parts[FULL].flops if mask == whole else sum(manifest.parts[part].flops for part in run)
        entries.append({"mask": mask, "blocks": mask.count("1"), **_times_of(series.get(mask, _Series()), flops)})
    chain = [{"part": part, **_times_of(found, manifest.parts[part].flops)} for part, found in parts.items()]
    stages = _stages(calls)
    _add_shares([*chain, *entries], stages, len(calls))
    entries.sort(key=lambda entry: -entry["images"])
    images = sum(len(call.masks) for call in calls)
    hits = sum(entry["images"] for entry in entries)
    return {
        "images": images,
        "hits": hits,
        "hit_rate": hits / images,
        "call_ms": latency_summary(_call_times(calls)),
        "stages": stages,
        "paths": entries,
        "missed": {
            "images": images - hits,
            "share": sum(entry["share"] for entry in chain if entry["part"] != POLICY),
        },
    }


def _add_shares(engines: list[dict[str, Any]], stages: list[dict[str, Any]], calls: int) -> None:
    """``share`` of engines and stages; those of the policy and of the network are the sums of their engines'."""
    weights = [entry["runs"] * (entry["p50_ms"] or 0.0) for entry in engines]
    policy = sum(weight for entry, weight in zip(engines, weights, strict=True) if entry.get("part") == POLICY)
    weight_of_stage = {entry["stage"]: calls * entry["p50_ms"] for entry in stages}
    weight_of_stage["policy"], weight_of_stage["network"] = policy, sum(weights) - policy
    total = sum(weight_of_stage.values())
    for entry, weight in zip(engines, weights, strict=True):
        entry["share"] = weight / total
    for entry in stages:
        entry["share"] = weight_of_stage[entry["stage"]] / total


def launch_cost_ms(alone: dict[str, Alone]) -> float:
    """An upper estimate of what calling any part costs before it computes.

    No part is called for less than the cheapest part takes alone at batch 1, without the time that its bytes take.
    """
    return max(0.0, min(part.ms - (part.single_copy_ms or 0.0) for part in alone.values()))


def bound_of(p50_ms: float | None, launch_ms: float | None, copy_ms: float | None, share: float) -> str | None:
    """What a part's time is made of: ``launch`` or ``memory`` when that takes ``share`` of it, else ``compute``.

    None where the part did not run or there is nothing to judge by.
    """
    if p50_ms is None or launch_ms is None or copy_ms is None:
        return None
    if max(launch_ms, copy_ms) < share * p50_ms:
        return COMPUTE
    return LAUNCH if launch_ms >= copy_ms else MEMORY


def _criterion(launch_ms: float | None, device: str, computes: bool, config: ProfileConfig) -> dict[str, Any]:
    share = f"{config.bound_share:.0%}"
    text = (
        f"launch-bound: calling a part at all (the cheapest part alone at batch 1, without its bytes' copy) takes at "
        f"least {share} of its p50; memory-bound: a plain copy of as many bytes as its engine, input and output have "
        f"takes at least {share}; compute-bound otherwise"
    )
    if not computes:
        text = "not judged: this backend computes nothing"
    elif device != "cpu":
        text = "not judged: the memory of this device is not the host's"
    return {"launch_ms": launch_ms, "share": config.bound_share, "text": text}


def _full_entry(entry: PartEntry, measured: Profile) -> dict[str, Any]:
    """The undropped network's own engine: whole calls on the same images, preprocessing included."""
    rate = entry.flops * measured.batch / float(np.median(measured.full_ms)) / 1e6
    return latency_summary(measured.full_ms) | {"flops": entry.flops, "gflops_per_s": rate}


# ---- stages and verbs --------------------------------------------------------------------------------------------


def _stages(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """What a call is made of; the stages of a call add up to it."""
    table = np.array([_stage_times(call) for call in calls])
    entries = []
    for (stage, meaning), times in zip(STAGES.items(), table.T, strict=True):
        p50, p90 = np.percentile(times, (50, 90)).tolist()
        entries.append(
            {"stage": stage, "mean_ms": float(times.mean()), "p50_ms": p50, "p90_ms": p90, "meaning": meaning}
        )
    return entries


def _stage_times(call: Call) -> list[float]:
    """In the order of :data:`STAGES`."""
    times = dict.fromkeys(STAGES, 0.0)
    times["preprocess"] = call.preprocess_ns / 1e6
    for event in call.events:
        times[_stage_of(event)] += event.ms
    times["between"] = call.ms - sum(times.values())
    return list(times.values())


def _stage_of(event: Event) -> str:
    if event.kind in (PART, FUSED):
        return "policy" if event.what == POLICY else "network"
    return {COPY: "copies", REGROUP: "regrouping"}[event.kind]


def _verbs(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Copies and regrouping by the session's verb: how often per call, on how many images, for how long."""
    found: dict[str, list[tuple[int, float]]] = {}
    for call in calls:
        for event in call.events:
            if event.kind not in (PART, FUSED):
                found.setdefault(event.what, []).append((event.rows, event.ms))
    return [
        {
            "verb": verb,
            "per_call": len(items) / len(calls),
            "images_per_call": sum(rows for rows, _ in items) / len(calls),
            "ms_per_call": sum(ms for _, ms in items) / len(calls),
        }
        for verb, items in found.items()
    ]


# ---- what the instrumentation costs ------------------------------------------------------------------------------


def _instrumentation(measured: Profile) -> dict[str, Any]:
    """``clocks_ms``: events per call times the cost of one; the three sides are whole calls, measured in turn."""
    calls = measured.calls
    per_call = sum(len(call.events) for call in calls) / len(calls)
    profiled = _call_times(calls)
    clocks_ms = per_call * measured.clock_us / 1e3
    return {
        "clock_us_per_event": measured.clock_us,
        "events_per_call": per_call,
        "clocks_ms": clocks_ms,
        "clocks_share": clocks_ms / float(np.median(profiled)),
        "as_run_ms": latency_summary(measured.as_run_ms),
        "part_by_part_ms": latency_summary(measured.part_by_part_ms),
        "profiled_ms": latency_summary(profiled),
        "part_by_part_over_as_run": float(np.median(measured.part_by_part_ms) / np.median(measured.as_run_ms)),
        "profiled_over_part_by_part": float(np.median(profiled) / np.median(measured.part_by_part_ms)),
    }


def _call_times(calls: Sequence[Call]) -> Times:
    return np.array([call.ms for call in calls])


def _notes(orchestrator: Orchestrator) -> list[str]:
    notes = list(orchestrator.session.notes)
    if orchestrator.device != "cpu":
        notes.append(
            "times are the host's: a device may still be computing when a part's call returns, and the wait then falls "
            "into the call that needs the result"
        )
    return notes
