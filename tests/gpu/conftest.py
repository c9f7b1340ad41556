"""Tests on an NVIDIA GPU: skipped with the reason where there is none; a table and a JSON file of what was tested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bdexport.bundle import Bundle
from bdexport.cuda import why_no_cuda
from bdexport.files import write_json
from bdexport.hardware import gpu_report, gpu_to_json, package_versions

RESULTS = Path("build") / "test-gpu.json"
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "pycuda", "tensorrt", "tensorrt-rtx-cu13")
_reports: dict[str, tuple[str, str]] = {}  # outcome and reason by test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    own = [item for item in items if here in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if Path(__file__).parent in item.path.parents and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        _reports[item.nodeid] = (report.outcome, reason)
    return report  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _reports:
        return
    outcomes: dict[str, list[int]] = {}
    for name, (outcome, _) in _reports.items():
        subject = name.partition("::")[2].partition("[")[0]
        outcomes.setdefault(subject, [0, 0, 0])[("passed", "failed", "skipped").index(outcome)] += 1
    terminalreporter.section("on the GPU")
    for subject, (passed, failed, skipped) in outcomes.items():
        terminalreporter.write_line(f"{subject:64} {passed:3} passed {failed:3} failed {skipped:3} skipped")
    RESULTS.parent.mkdir(exist_ok=True)
    tests = {name: {"outcome": outcome, "reason": reason} for name, (outcome, reason) in _reports.items()}
    gpus = [gpu_to_json(gpu) for gpu in gpu_report().gpus]
    write_json(
        RESULTS, {"schema": "bdexport.test-gpu/1", "gpus": gpus, "versions": package_versions(PACKAGES), "tests": tests}
    )
    terminalreporter.write_line(f"JSON: {RESULTS}")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """A GPU that cuda-python or PyCUDA can use."""
    error = why_no_cuda()
    if error is not None:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Bundle]:
    """Bundles built so far, by backend, network and precision."""
    return {}
