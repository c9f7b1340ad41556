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
from bdexport.json_text import why
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
        if any(name not in data for name in FIELDS) or data["kind"] not in KINDS:
            raise KeyError(next((name for name in FIELDS if name not in data), "kind"))
        if data.get("dry_run"):
            return f"{where}: a dry run on a CPU, which measures nothing"
        if not data["gpus"]:
            return f"{where}: measured without a GPU"
        headline, table = headline_of(data), _tables().get(data["kind"])
        return Benchmark(data["kind"], where, headline, None if table is None else table(data))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{where}: not a complete result of a GPU benchmark ({why(error)})"
        raise ReportError(what, remedy="write it again with the script in benchmarks/") from error


def headline_of(data: dict[str, Any]) -> str:
    """The most important figure in a few words."""
    rows, skipped = data["results"], len(data["skipped"])
    if data["kind"] == TESTS:
        counts = Counter(str(row["outcome"]) for row in rows)
        return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if data["kind"] == LATENCY:
        best: dict[str, float] = {}
        for row in rows:
            best[row["workload"]] = min(float(row["ratio"]), best.get(row["workload"], float("inf")))
        return ", ".join(f"{name} {ratio:.2f}" for name, ratio in best.items()) or f"nothing, {skipped} skipped"
    if data["kind"] == TRAINING:
        return ", ".join(f"{row['phase']} {row['images_per_s']:,.0f}/s" for row in rows) or "nothing"
    return f"{len(rows)} figures, {skipped} skipped"


def _tables() -> dict[str, Callable[[dict[str, Any]], Table]]:
    return {LATENCY: _latency, TRAINING: _training, PROBE: _probe, TESTS: _tests}


def _latency(data: dict[str, Any]) -> Table:
    columns = ("workload", "contestant", "full, ms", "dynamic, ms", "dynamic / full", "efficiency", "targets")
    table = Table(f"Dynamic inference against the full network, p50 host to host, {_setting(data)}", columns)
    for row in data["results"]:
        judged = [
            f"{item['quantity']} {item['bound']}: {'met' if item['met'] else 'missed'}" for item in row["targets"]
        ]
        table.rows.append(
            (
                f"{row['arch']}, batch {row['batch']}, {row['kept']} blocks",
                f"{row['backend']} {row['executor']}",
                *(f"{row[side]['p50']:.3f}" for side in ("full_ms", "dynamic_ms")),
                *(f"{row[name]:.2f}" for name in ("ratio", "efficiency")),
                "; ".join(judged),
            )
        )
    return table


def _training(data: dict[str, Any]) -> Table:
    settings = data["settings"]
    title = f"Training speed, {settings['arch']}, batch {settings['batch']}, {settings['precision']}"
    table = Table(f"{title}, {_setting(data)}", ("phase", "images/s", "slowest to fastest round", "of the peak"))
    for row in data["results"]:
        slowest, fastest = row["images_per_s_range"]
        speeds = (f"{row['images_per_s']:,.0f}", f"{slowest:,.0f} to {fastest:,.0f}")
        table.rows.append((row["phase"], *speeds, f"{row['share_of_peak']:.1%}"))
    return table


def _probe(data: dict[str, Any]) -> Table:
    table = Table(f"Single operations, us on the host's clock, {_setting(data)}", ("what", "p50", "p99", "each"))
    for row in data["results"]:
        times = row["us"]
        table.rows.append((row["what"], f"{times['p50']:.1f}", f"{times['p99']:.1f}", f"{row['us_each']:.2f}"))
    return table


def _tests(data: dict[str, Any]) -> Table:
    table = Table(f"Tests, {_setting(data)}", ("test", "passed", "failed", "skipped"))
    counts: dict[str, Counter[str]] = {}
    for row in data["results"]:
        name = str(row["test"]).rpartition("/")[2].partition("[")[0]
        counts.setdefault(name, Counter())[str(row["outcome"])] += 1
    for name, found in counts.items():
        table.rows.append((name, *(str(found[outcome]) for outcome in ("passed", "failed", "skipped"))))
    return table


def _setting(data: dict[str, Any]) -> str:
    """What the figures come from: the GPU with its clock, driver, versions, date."""
    gpu, versions = data["gpus"][0], data["versions"]
    clock = "" if gpu["sm_clock_mhz"] is None else f" at {gpu['sm_clock_mhz']} MHz"
    packages = [f"{name} {versions[name]}" for name in ("torch", "onnxruntime-gpu", "tensorrt") if name in versions]
    cut = "" if data["complete"] else "; cut off before its end"
    return f"{gpu['name']}{clock} (driver {gpu['driver']}, {', '.join(packages)}; {str(data['date'])[:10]}{cut})"
