"""Results of GPU benchmarks in a report and in the README: what they show, and what is not taken for a result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bdexport.config import ReportConfig
from bdexport.errors import ReportError, UsageError
from bdexport.report.benchmarks import BENCHMARK_SCHEMA, Benchmark, headline_of, read_benchmark
from bdexport.report.collect import collect
from bdexport.report.document import document
from bdexport.report.page import markdown_page
from bdexport.report.sources import read_sources

GPU = {"name": "NVIDIA H200", "driver": "580.1", "sm_clock_mhz": 1980}
TIMES = {"p50": 1.25, "p90": 1.5, "p99": 2.0, "mean": 1.3, "min": 1.2}
LATENCY_ROW: dict[str, Any] = {"workload": "small", "arch": "resnet110", "batch": 1, "kept": 17, "executor": "graph"}
LATENCY_ROW |= {"backend": "torch", "full_ms": TIMES, "dynamic_ms": TIMES | {"p50": 0.625}, "ratio": 0.5}
LATENCY_ROW |= {"efficiency": 0.75, "targets": [{"quantity": "ratio", "bound": "<= 0.45", "met": False}]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "latency": [LATENCY_ROW, LATENCY_ROW | {"executor": "chain", "ratio": 0.9}],
    "training": [
        {"phase": "finetune", "images_per_s": 41000.4, "images_per_s_range": [4e4, 4.2e4], "share_of_peak": 0.1}
    ],
    "probe": [{"what": "kernel, launch and wait", "us": TIMES, "us_each": 1.25}],
    "tests": [{"test": f"tests/gpu/test_a.py::test_b[{index}]", "outcome": "passed", "reason": ""} for index in (1, 2)],
    "session": [{"step": "probe", "outcome": "done", "seconds": 3.0, "text": ""}],
}
SETTINGS = {"arch": "resnet32", "batch": 1024, "precision": "bf16"}


def result(kind: str, **changes: Any) -> dict[str, Any]:
    """A complete file of that kind, as from a machine with a GPU."""
    head: dict[str, Any] = {
        "schema": BENCHMARK_SCHEMA,
        "kind": kind,
        "date": "2026-12-01T10:00:00+00:00",
        "commit": None,
    }
    head |= {"device": "cuda", "gpus": [GPU], "versions": {"torch": "2.11.0"}, "settings": SETTINGS}
    return head | {"complete": True, "dry_run": False, "skipped": {}, "results": ROWS[kind]} | changes


def written(folder: Path, **files: dict[str, Any]) -> list[Path]:
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return [folder / f"{name}.json" for name in files]


def test_a_report_shows_them(tmp_path: Path) -> None:
    """Oracle: the figures of the files, with GPU, clock, driver, versions and date."""
    paths = written(tmp_path, **{kind: result(kind) for kind in ROWS})
    report = collect(read_sources(paths), None, ReportConfig(), "bdexport report", lambda _, batches, __: iter(batches))
    page = markdown_page(document(report, ReportConfig()))
    assert "NVIDIA H200 at 1980 MHz (driver 580.1, torch 2.11.0; 2026-12-01)" in page
    assert "| resnet110, batch 1, 17 blocks | torch graph | 1.250 | 0.625 | 0.50 | 0.75 | ratio" in page
    assert "| finetune | 41,000 | 40,000 to 42,000 | 10.0% |" in page
    assert "| kernel, launch and wait | 1.2 | 2.0 | 1.25 |" in page
    assert "::test\\_b | 2 | 0 | 0 |" in page
    assert len(report.to_json()["benchmarks"]) == 4  # a session says what ran, and has no table


@pytest.mark.parametrize(
    ("kind", "headline"),
    [
        ("latency", "small 0.50"),
        ("training", "finetune 41,000/s"),
        ("probe", "1 figures, 0 skipped"),
        ("tests", "2 passed, 0 failed, 0 skipped"),
    ],
)
def test_the_most_important_figure_comes_first(kind: str, headline: str) -> None:
    """Oracle: the rows; of several contestants the best."""
    assert headline_of(result(kind)) == headline


def test_what_is_no_result_is_not_shown(tmp_path: Path) -> None:
    """Oracle: a dry run and a run without a GPU are named with the reason; alone they are nothing to report on."""
    dry, cpu = result("latency", dry_run=True), result("training", gpus=[], device="cpu")
    for data, reason in ((dry, "a dry run on a CPU"), (cpu, "measured without a GPU")):
        shown = read_benchmark(data, "x.json")
        assert isinstance(shown, str)
        assert reason in shown
    with pytest.raises(UsageError, match=r"dry\.json: a dry run.*cpu\.json: measured without a GPU"):
        read_sources(written(tmp_path, dry=dry, cpu=cpu))


def test_a_run_that_was_cut_off_says_so() -> None:
    """Oracle: the title."""
    found = read_benchmark(result("probe", complete=False), "x.json")
    assert isinstance(found, Benchmark)
    assert found.table is not None
    assert "cut off before its end" in found.table.title


@pytest.mark.parametrize(
    "damage", [{"kind": "other"}, {"results": [{}]}, {"gpus": [{}]}, {"versions": None}, {"results": 3}]
)
def test_a_damaged_file_is_refused(damage: dict[str, Any]) -> None:
    """Oracle: ReportError that names the file."""
    with pytest.raises(ReportError, match=r"x\.json: not a complete result of a GPU benchmark"):
        read_benchmark(result("latency") | damage, "x.json")


def test_the_readme_shows_the_results(repository: Path) -> None:
    """Oracle: what the files in benchmarks/results/gpu/ hold, or the sentence that there are none."""
    script = repository / "benchmarks" / "gpu_results.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
