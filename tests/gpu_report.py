"""What was tested on the GPU: a JSON file that grows with every test marked gpu, and a short table after the last.

Hooks for conftest.py. The file is ``$BDEXPORT_GPU_RESULTS``, else ``build/test-gpu.json``; its form is that of the
other GPU results (``bdexport/report/benchmarks.py``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(os.environ.get("BDEXPORT_GPU_RESULTS") or Path("build") / "test-gpu.json")
OUTCOMES = ("passed", "failed", "skipped")
REASON_CHARACTERS = 400
_reports: dict[str, tuple[str, str]] = {}  # outcome and reason by test


@cache
def _file() -> Any:
    """The result file. Imported on use, since other tests need none of it."""
    from bdexport.report.benchmarks import TESTS

    folder = str(Path(__file__).resolve().parents[1] / "benchmarks")
    sys.path.append(folder)
    common = import_module("gpu_common")
    sys.path.remove(folder)
    return common.ResultFile(RESULTS, TESTS, {"arguments": sys.argv[1:]})


def _write(complete: bool = False) -> None:
    rows = [{"test": name, "outcome": outcome, "reason": reason} for name, (outcome, reason) in _reports.items()]
    _file().write(rows, complete=complete)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if item.get_closest_marker("gpu") is not None and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _reports[item.nodeid] = (report.outcome, reason[-REASON_CHARACTERS:])
        _write()
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where everything was skipped, nothing was tested: that is no success."""
    if _reports and exitstatus == 0 and not any(outcome == "passed" for outcome, _ in _reports.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if not _reports:
        return
    counts: dict[str, list[int]] = {}
    for name, (outcome, _) in _reports.items():
        test = name.rpartition("/")[2].partition("[")[0]
        counts.setdefault(test, [0, 0, 0])[OUTCOMES.index(outcome)] += 1
    terminalreporter.section("on the GPU")
    for test, (passed, failed, skipped) in counts.items():
        terminalreporter.write_line(f"{test:80} {passed:3} passed {failed:3} failed {skipped:3} skipped")
    _write(complete=exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))
    terminalreporter.write_line(f"JSON: {RESULTS}")
