"""The doctor against packages made for the test: absent, whole, broken, crashing, hanging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdexport import doctor
from bdexport.doctor import Finding, Probe, Report, packages, run_probe
from bdexport.hardware import GpuReport

NO_GPU = GpuReport((), installed=False, reason="none")


def probe(module: str, code: str | None = None) -> Probe:
    return Probe("it", "build", module, code or f"import {module}\nversion = {module}.__version__", "install", "again")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the other process searches first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_whole_package(site: Path) -> None:
    """Oracle: the version in the module, whatever it prints while it loads."""
    (site / "chatty.py").write_text(
        "print('hello')\n__version__ = '1.2'\nimport sys; print('warning', file=sys.stderr)"
    )
    assert run_probe(probe("chatty")) == Finding("it", "build", "ok", "1.2", "")


def test_numpy_is_found() -> None:
    """Oracle: numpy's own version, through the real list of packages."""
    numpy = next(probe for probe in packages() if probe.name == "numpy")
    assert run_probe(numpy) == Finding("numpy", "core", "ok", np.__version__)


def test_absent_package() -> None:
    """Oracle: no such module is missing, not broken, with the line that installs it."""
    for module in ("no_such_module", "no_such_module.inner"):
        assert run_probe(probe(module, f"import {module}")) == Finding("it", "build", "missing", remedy="install")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise ImportError('libsomething.so.12: no such file')", "ImportError: libsomething.so.12: no such file"),
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed while loading (SIGSEGV)"),
        ("import os; os._exit(3)", "ended with exit code 3 while loading"),
        ("raise SystemExit('leaving')", "leaving"),
        ("x = 1", "has no attribute '__version__'"),
    ],
)
def test_broken_package_is_shown_with_its_error(site: Path, content: str, said: str) -> None:
    """Oracle: the error's own words and the line that replaces the package; the doctor survives it."""
    (site / "sick.py").write_text(content)
    found = run_probe(probe("sick"))
    assert (found.state, found.remedy) == ("broken", "again")
    assert said in found.detail
    assert "\n" not in found.detail


def test_package_that_needs_a_driver(site: Path) -> None:
    """Oracle: what helps is the driver, not the package again."""
    (site / "sick.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    assert "driver" in (run_probe(probe("sick")).remedy or "")


def test_package_that_hangs(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the time limit."""
    monkeypatch.setattr(doctor, "TIMEOUT_S", 1.0)
    (site / "slow.py").write_text("import time; time.sleep(60)")
    found = run_probe(probe("slow"))
    assert (found.state, found.detail) == ("broken", "did not load within 1 s")


def test_overwritten_onnxruntime_gpu(site: Path) -> None:
    """Oracle: both packages are installed and the module is the CPU one: pip's record alone would say all is well."""
    (site / "onnxruntime_gpu-9.9.dist-info").mkdir()
    (site / "onnxruntime_gpu-9.9.dist-info" / "METADATA").write_text("Name: onnxruntime-gpu\nVersion: 9.9\n")
    (site / "onnxruntime.py").write_text("def get_available_providers(): return ['CPUExecutionProvider']")
    found = run_probe(next(probe for probe in packages() if probe.name == "onnxruntime-gpu"))
    assert found.state == "broken"
    assert "has replaced it" in found.detail
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in (found.remedy or "")


def report(**states: Any) -> Report:
    core = [Finding("numpy", "core", states.pop("numpy", "ok"), detail="why")]
    return Report((*core, *(Finding(name, "backend", state) for name, state in states.items())), NO_GPU)


def test_what_counts_as_failure() -> None:
    """Oracle: the rule: a broken core, or no backend that computes anything."""
    assert report(onnxruntime="ok", torch="missing", null="ok").failure() is None
    assert report(onnxruntime="broken", torch="ok", null="ok").failure() is None
    for states in ({"onnxruntime": "missing", "torch": "broken", "null": "ok"}, {"onnxruntime": "missing"}):
        failure = report(**states).failure()
        assert failure is not None
        assert failure.name == "onnxruntime"
    failure = report(numpy="broken", onnxruntime="ok").failure()
    assert failure is not None
    assert failure.group == "core"
    assert not report(numpy="broken").to_json()["ok"]


def run_doctor(site: Path, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with ``site`` searched before the installed packages; the heavy packages are replaced there."""
    for name in ("torch", "sklearn", "tensorboard", "onnx", "openvino"):
        if not (site / f"{name}.py").exists():
            (site / f"{name}.py").write_text("raise ImportError('made for the test')")
    search = os.pathsep.join((str(site), str(repository)))
    command = [sys.executable, "-m", "bdexport", "doctor", *arguments]
    environment = os.environ | {"PYTHONPATH": search}
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=False)


def test_command(tmp_path: Path, repository: Path) -> None:
    """Oracle: exit 0 though packages are broken, since one backend runs; the JSON says the same as the table."""
    result = run_doctor(tmp_path, repository, "--json", "result.json")
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "result.json").read_text())
    assert data["schema"] == "bdexport.doctor/1"
    assert data["ok"]
    found = {(entry["name"], entry["group"]): entry for entry in data["findings"]}
    assert found["python", "core"]["state"] == found["onnxruntime", "backend"]["state"] == "ok"
    assert found["torch", "build"]["state"] == found["torch", "backend"]["state"] == "broken"
    assert "made for the test" in found["torch", "build"]["detail"]
    for name, _ in found:
        assert name in result.stdout
    for entry in data["findings"]:
        assert entry["state"] == "ok" or entry["remedy"] in result.stdout


def test_command_without_any_backend(tmp_path: Path, repository: Path) -> None:
    """Oracle: exit 1 and one line, after the table."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('made for the test')")
    result = run_doctor(tmp_path, repository, "--json", "-")
    assert result.returncode == 1
    assert not json.loads(result.stdout)["ok"]
    assert "no backend can run here" in result.stderr.splitlines()[-1]


def test_command_with_broken_numpy(tmp_path: Path, repository: Path) -> None:
    """Oracle: exit 1, and numpy is named with its own error."""
    (tmp_path / "numpy.py").write_text("raise ImportError('made for the test')")
    result = run_doctor(tmp_path, repository)
    assert result.returncode == 1
    assert "numpy is broken: ImportError: made for the test; pip install --force-reinstall numpy" in result.stderr
    assert "│ numpy" in result.stdout


def test_a_line_names_nothing_twice_and_does_not_send_back_here() -> None:
    """Oracle: the contract: package and backend of one name are one entry; doctor does not say to run doctor."""
    from bdexport.cli.doctor import remedies

    missing = tuple(Finding("tensorrt", group, "missing", remedy="pip install x") for group in ("tensorrt", "backend"))
    assert remedies(Report(missing, NO_GPU)) == {"pip install x": ["tensorrt missing"]}
    code = "state, remedy = 'missing', 'install the NVIDIA driver; run `bdexport doctor`'; raise RuntimeError"
    assert run_probe(Probe("x", "backend", "sys", code, "", "")).remedy == "install the NVIDIA driver"


@pytest.mark.parametrize(
    ("builds", "state", "detail"),
    [(True, "build only", "engines can be built here, not run: it is installed; no driver"), (False, "missing", None)],
)
def test_a_backend_that_only_lacks_a_driver(site: Path, builds: bool, state: str, detail: str | None) -> None:
    """Oracle: the package is not what is missing, and what is stands in the remark and the remedy."""
    from bdexport.cli.doctor import findings_table, remedies
    from bdexport.doctor import _BACKEND

    (site / "stand_in.py").write_text(
        "class Answer:\n"
        "    def __init__(self, ok, reason, remedy=None): self.ok, self.reason, self.remedy = ok, reason, remedy\n"
        "class Backend:\n"
        "    def available(self): return Answer(False, 'it is installed; no driver', 'install the driver')\n"
        f"    def can_build(self): return Answer({builds}, 'it')\n"
        "def backend_class(name): return Backend\n"
    )
    code = _BACKEND.format(name="it").replace("bdexport.backends", "stand_in")
    found = run_probe(Probe("it", "backend", "stand_in", code, "install it", "again"))
    assert (found.state, found.detail) == (state, detail or "it is installed; no driver")
    shown = Report((Finding("it", "it", "ok", "1.0"), found), NO_GPU)
    assert remedies(shown) == {"install the driver": [f"backend it {state}"]}
    assert findings_table(shown).row_count == 2
    assert shown.failure() == found


def test_tensorrt_for_rtx_as_it_is_here() -> None:
    """Oracle: the wheel and the driver that are here."""
    pytest.importorskip("tensorrt_rtx")
    found = run_probe(next(probe for probe in doctor._backend_probes() if probe.name == "tensorrt-rtx"))
    if found.state == "ok":
        pytest.skip("a GPU is here")
    assert found.state == "build only"
    assert "TensorRT for RTX" in found.detail
    assert "is installed" in found.detail
    assert "install the NVIDIA driver" in (found.remedy or "")
