"""Results of the scripts in ``benchmarks/`` that run on a GPU: one form for all of them, and its tables.

A file holds one object: ``schema`` (:data:`BENCHMARK_SCHEMA`), ``kind`` (one of :data:`KINDS`), ``date``, ``commit``,
``code`` (a digest of the sources), ``device``, ``machine``, ``gpus`` with clocks and driver, ``versions``,
``settings``, ``results`` (a list of rows whose fields depend on the kind), ``skipped`` (reason by name), ``complete``
(false: it was cut off, and has what was measured until then) and ``dry_run`` (true: the CPU stood in for the GPU, and
the figures are no results).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bdexport.errors import ReportError
from bdexport.json_text import MalformedError, shown, why
from bdexport.report.fields import count, field, figure, is_figure, part, text
from bdexport.report.tables import Table

BENCHMARK_SCHEMA = "bdexport.benchmark/1"
LATENCY, PROBE, TESTS, TRAINING, SESSION = KINDS = ("latency", "probe", "tests", "training", "session")
FIELDS = ("kind", "date", "commit", "device", "gpus", "versions", "settings", "results", "skipped", "complete")


@dataclass(frozen=True)
class Benchmark:
    """One file. ``table`` is None for a kind that has nothing to show (``session``: what ran, not what it gave)."""

    kind: str
    where: str
    headline: str
    table: Table | None


def read_benchmark(data: dict[str, Any], where: str) -> Benchmark | str:
    """The benchmark in a file; a text that says why it is not shown. Raises ReportError for a damaged file."""
    try:
        for name in FIELDS:
            field(data, name)
        if data["kind"] not in KINDS:
            raise MalformedError(f"kind: got {shown(data['kind'])}, expected {', '.join(KINDS)}")
        if data.get("dry_run"):
            return f"{where}: a dry run on a CPU, which measures nothing"
        _check_lists(data)
        if not data["gpus"]:
            return f"{where}: measured without a GPU"
        headline, table = headline_of(data), _tables().get(data["kind"])
        return Benchmark(data["kind"], where, headline, None if table is None else table(data))
    except MalformedError as error:
        what = f"{where}: not a complete result of a GPU benchmark ({why(error)})"
        raise ReportError(what, remedy="write it again with the script in benchmarks/") from error


def _check_lists(data: dict[str, Any]) -> None:
    for name in ("gpus", "results"):
        if not isinstance(data[name], list) or not all(isinstance(row, dict) for row in data[name]):
            raise MalformedError(f"{name}: expected a list of objects")
    for name in ("skipped", "versions", "settings"):
        part(data, name)


def headline_of(data: dict[str, Any]) -> str:
    """The most important figure in a few words."""
    rows, skipped = data["results"], len(data["skipped"])
    if data["kind"] == TESTS:
        counts = Counter(text(row, "outcome") for row in rows)
        return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if data["kind"] == LATENCY:
        best: dict[str, float] = {}
        for row in rows:
            name = text(row, "workload")
            best[name] = min(figure(row, "ratio"), best.get(name, float("inf")))
        return ", ".join(f"{name} {ratio:.2f}" for name, ratio in best.items()) or f"nothing, {skipped} skipped"
    if data["kind"] == TRAINING:
        return ", ".join(f"{text(row, 'phase')} {figure(row, 'images_per_s'):,.0f}/s" for row in rows) or "nothing"
    return f"{len(rows)} figures, {skipped} skipped"


def _tables() -> dict[str, Callable[[dict[str, Any]], Table]]:
    return {LATENCY: _latency, TRAINING: _training, PROBE: _probe, TESTS: _tests}


def _latency(data: dict[str, Any]) -> Table:
    columns = ("workload", "contestant", "full, ms", "dynamic, ms", "dynamic / full", "efficiency", "targets")
    table = Table(f"Dynamic inference against the full network, p50 host to host, {_setting(data)}", columns)
    for row in data["results"]:
        targets = field(row, "targets")
        if not isinstance(targets, list):
            raise MalformedError(f"targets: got {shown(targets)}, expected a list")
        judged = [
            f"{text(item, 'quantity')} {text(item, 'bound')}: {'met' if field(item, 'met') else 'missed'}"
            for item in targets
        ]
        table.rows.append(
            (
                f"{text(row, 'arch')}, batch {count(row, 'batch')}, {count(row, 'kept')} blocks",
                f"{text(row, 'backend')} {text(row, 'executor')}",
                *(f"{figure(row, f'{side}.p50'):.3f}" for side in ("full_ms", "dynamic_ms")),
                *(f"{figure(row, name):.2f}" for name in ("ratio", "efficiency")),
                "; ".join(judged),
            )
        )
    return table


def _training(data: dict[str, Any]) -> Table:
    settings = data["settings"]
    title = f"Training speed, {text(settings, 'arch')}, batch {count(settings, 'batch')}, {text(settings, 'precision')}"
    table = Table(f"{title}, {_setting(data)}", ("phase", "images/s", "slowest to fastest round", "of the peak"))
    for row in data["results"]:
        span = field(row, "images_per_s_range")
        if not isinstance(span, list) or len(span) != 2 or not all(is_figure(value) for value in span):
            raise MalformedError(f"images_per_s_range: got {shown(span)}, expected two numbers")
        slowest, fastest = span
        speeds = (f"{figure(row, 'images_per_s'):,.0f}", f"{slowest:,.0f} to {fastest:,.0f}")
        table.rows.append((text(row, "phase"), *speeds, f"{figure(row, 'share_of_peak'):.1%}"))
    return table


def _probe(data: dict[str, Any]) -> Table:
    table = Table(f"Single operations, us on the host's clock, {_setting(data)}", ("what", "p50", "p99", "each"))
    for row in data["results"]:
        times = [figure(row, name) for name in ("us.p50", "us.p99", "us_each")]
        table.rows.append((text(row, "what"), f"{times[0]:.1f}", f"{times[1]:.1f}", f"{times[2]:.2f}"))
    return table


def _tests(data: dict[str, Any]) -> Table:
    table = Table(f"Tests, {_setting(data)}", ("test", "passed", "failed", "skipped"))
    counts: dict[str, Counter[str]] = {}
    for row in data["results"]:
        name = text(row, "test").rpartition("/")[2].partition("[")[0]
        counts.setdefault(name, Counter())[text(row, "outcome")] += 1
    for name, found in counts.items():
        table.rows.append((name, *(str(found[outcome]) for outcome in ("passed", "failed", "skipped"))))
    return table


def _setting(data: dict[str, Any]) -> str:
    """What the figures come from: the GPU with its clock, driver, versions, date."""
    gpu, versions = data["gpus"][0], data["versions"]
    clock = "" if field(gpu, "sm_clock_mhz") is None else f" at {figure(gpu, 'sm_clock_mhz'):g} MHz"
    named = [name for name in ("torch", "onnxruntime-gpu", "tensorrt") if name in versions]
    packages = [f"{name} {text({name: versions[name]}, name)}" for name in named]
    source = f"driver {text(gpu, 'driver')}, {', '.join(packages)}; {text(data, 'date')[:10]}"
    cut = "" if data["complete"] else "; cut off before its end"
    return f"{text(gpu, 'name')}{clock} ({source}{cut})"
