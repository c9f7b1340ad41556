"""What was tested on the GPU: a short table and a JSON file after the tests marked gpu. Hooks for conftest.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

RESULTS = Path("build") / "test-gpu.json"
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "pycuda", "tensorrt", "tensorrt-rtx-cu13")
OUTCOMES = ("passed", "failed", "skipped")
_reports: dict[str, tuple[str, str]] = {}  # outcome and reason by test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if item.get_closest_marker("gpu") is not None and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        _reports[item.nodeid] = (report.outcome, reason)
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where everything was skipped, nothing was tested: that is no success."""
    if _reports and exitstatus == 0 and not any(outcome == "passed" for outcome, _ in _reports.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _reports:
        return
    from bdexport.files import write_json
    from bdexport.hardware import gpu_report, gpu_to_json, package_versions

    counts: dict[str, list[int]] = {}
    for name, (outcome, _) in _reports.items():
        test = name.rpartition("/")[2].partition("[")[0]
        counts.setdefault(test, [0, 0, 0])[OUTCOMES.index(outcome)] += 1
    terminalreporter.section("on the GPU")
    for test, (passed, failed, skipped) in counts.items():
        terminalreporter.write_line(f"{test:80} {passed:3} passed {failed:3} failed {skipped:3} skipped")
    data = {
        "schema": "bdexport.test-gpu/1",
        "gpus": [gpu_to_json(gpu) for gpu in gpu_report().gpus],
        "versions": package_versions(PACKAGES),
        "tests": {name: {"outcome": outcome, "reason": reason} for name, (outcome, reason) in _reports.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, data)
    terminalreporter.write_line(f"JSON: {RESULTS}")
