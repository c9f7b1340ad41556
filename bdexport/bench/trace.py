"""A profile in the Trace Event Format that Chrome (chrome://tracing) and Perfetto open: one slice per event.

Slices are complete events ("ph": "X"), nested by time: call > preprocess, parts, copies, regrouping. Calls part by part
are on one track, those through the fused paths on another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bdexport.bench.profiling import Call, Profile
from bdexport.files import write_text
from bdexport.parts import mask_to_text

PROCESS, TRACK, FUSED_TRACK = 1, 1, 2


def trace_events(measured: Profile) -> list[dict[str, Any]]:
    """Every profiled call as slices; ``ts`` and ``dur`` in microseconds from the beginning of the first call."""
    tracks = {TRACK: ("calls", measured.calls), FUSED_TRACK: ("calls, fused", measured.fused_calls)}
    origin = min(calls[0].begin_ns for _, calls in tracks.values() if calls)
    events = [_named("process_name", "bdexport profile", TRACK)]
    for track, (name, calls) in tracks.items():
        if calls:
            events.append(_named("thread_name", name, track))
        for number, call in enumerate(calls):
            events += [event | {"tid": track} for event in _call_events(call, number, origin)]
    return events


def write_trace(path: Path, measured: Profile, about: dict[str, Any]) -> None:
    """Write the trace atomically; ``about`` is kept beside it. Raises :class:`OutputError` where it cannot be."""
    document = {"traceEvents": trace_events(measured), "displayTimeUnit": "ms", "otherData": about}
    write_text(path, json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n")


def _call_events(call: Call, number: int, origin: int) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = {"images": len(call.masks), "blocks_used": int(call.masks.sum())}
    if len(call.masks) == 1:
        arguments["mask"] = mask_to_text(call.masks[0])
    slices = [_slice(f"call {number}", "call", call.begin_ns, call.end_ns, origin, arguments)]
    # The orchestrator's own clock starts a little after the call's beginning: the difference is not worth a slice.
    slices.append(_slice("preprocess", "preprocess", call.begin_ns, call.begin_ns + call.preprocess_ns, origin, {}))
    slices += [
        _slice(event.what, event.kind, event.begin_ns, event.end_ns, origin, {"images": event.rows})
        for event in call.events
    ]
    return slices


def _slice(
    name: str, category: str, begin_ns: int, end_ns: int, origin: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": (begin_ns - origin) / 1e3,
        "dur": (end_ns - begin_ns) / 1e3,
        "pid": PROCESS,
        "args": arguments,
    }


def _named(what: str, name: str, track: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": PROCESS, "tid": track, "args": {"name": name}}
