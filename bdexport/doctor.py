"""What is installed here, what is broken, what is missing, and the line that mends it.

Every package is imported in a process of its own: one that crashes while it loads (a wrong CUDA library does that)
becomes a line of the report and not the end of it. Neither numpy nor torch is imported here.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bdexport import __version__
from bdexport.hardware import GpuReport, gpu_report, gpu_to_json, machine, usable_cores
from bdexport.packages import install_line
from bdexport.requirements import outdated

State = Literal["ok", "build only", "missing", "broken"]  # build only: a backend whose engines run elsewhere
TIMEOUT_S = 120.0  # for one import; torch from a cold network disk takes tens of seconds
MARK = "bdexport-probe:"  # packages print things of their own while they load
OLDEST_PYTHON = (3, 11)
NO_ARITHMETIC = ("null",)  # backends that run anywhere and compute nothing


@dataclass(frozen=True)
class Probe:
    """A package: ``code`` imports ``module`` and sets ``version`` and ``detail``; it raises what is wrong."""

    name: str
    group: str
    module: str
    code: str
    install: str  # the line that installs it
    reinstall: str  # .. and that replaces one that is broken


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    group: str
    state: State
    version: str | None = None
    detail: str = ""
    remedy: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was found, and why bdexport cannot work here, if it cannot."""

    findings: tuple[Finding, ...]
    gpus: GpuReport

    def failure(self) -> Finding | None:
        """A broken core, or the first backend if none at all can run."""
        core = next((finding for finding in self.findings if finding.group == "core" and finding.state != "ok"), None)
        backends = [f for f in self.findings if f.group == "backend" and f.name not in NO_ARITHMETIC]
        if core is not None or any(finding.state == "ok" for finding in backends):
            return core
        return next(iter(backends), None)

    def to_json(self) -> dict[str, Any]:
        """As ``bdexport doctor --json`` writes it."""
        return {
            "schema": "bdexport.doctor/1",
            "ok": self.failure() is None,
            "machine": machine(),
            "gpus": [gpu_to_json(gpu) for gpu in self.gpus.gpus],
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine(done: Callable[[str], None] = lambda name: None) -> Report:
    """Look at everything; ``done`` is told the name of each package when its turn is over. Never raises."""
    gpus = gpu_report()
    with ThreadPoolExecutor(max(1, usable_cores())) as pool:
        findings = []
        for finding in pool.map(run_probe, probes()):
            done(finding.name)
            findings.append(finding)
    return Report((_python(), _bdexport(), *_in_groups(findings, gpus)), gpus)


def probes() -> tuple[Probe, ...]:
    """Everything that is tried: packages, then backends."""
    return (*packages(), *_backend_probes())


def packages() -> tuple[Probe, ...]:
    """Every package that some command can use, core first."""
    return (
        _package("core", "numpy", "numpy", ""),
        _package("core", "pillow", "PIL", "", imports="from PIL import Image; import PIL"),
        _package("cpu", "onnxruntime", "onnxruntime", _PROVIDERS),
        _package("openvino", "openvino", "openvino", _OPENVINO, imports=_OPENVINO_IMPORTS),
        _package("build", "torch", "torch", _TORCH),
        _package("build", "onnx", "onnx", ""),
        _package("build", "safetensors", "safetensors", "import safetensors.numpy"),
        _package("build", "scikit-learn", "sklearn", "import sklearn.datasets"),
        _package("build", "tensorboard", "tensorboard", ""),
        _package("report", "matplotlib", "matplotlib", ""),
        _package("gpu", "onnxruntime-gpu", "onnxruntime", _PROVIDERS_GPU, imports=_ONNXRUNTIME_GPU),
        _package("tensorrt", "tensorrt", "tensorrt", "detail = 'TensorRT ' + version.split('.')[0]"),
        _package("gpu", "cuda-python", "cuda.bindings", _CUDA, imports=_CUDA_IMPORTS),
        _package(
            "tensorrt-rtx", "tensorrt-rtx", "tensorrt_rtx", "detail = 'TensorRT for RTX'", package="tensorrt-rtx-cu13"
        ),
        _package("pycuda", "pycuda", "pycuda", "import pycuda.driver", imports=_PYCUDA),
    )


def run_probe(probe: Probe) -> Finding:
    """Run one probe in a process of its own."""
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), probe.module, probe.code]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _broken(probe, f"did not load within {TIMEOUT_S:.0f} s")
    except OSError as error:
        return _broken(probe, f"Python cannot be started ({error.strerror})")
    said = [line.removeprefix(MARK) for line in result.stdout.splitlines() if line.startswith(MARK)]
    if not said:
        return _broken(probe, _last_words(result.returncode, result.stderr))
    answer = json.loads(said[-1])
    if answer["state"] in ("missing", "build only"):
        detail = answer["detail"] if probe.group == "backend" else ""
        return Finding(
            probe.name,
            probe.group,
            answer["state"],
            None,
            detail,
            _beyond_doctor(answer.get("remedy")) or probe.install,
        )
    if answer["state"] == "broken":
        return _broken(probe, answer["detail"], _beyond_doctor(answer.get("remedy")))
    too_old = None if probe.group == "backend" else outdated(probe.name)
    if too_old is not None:
        return _broken(probe, str(too_old), too_old.remedy)
    return Finding(probe.name, probe.group, "ok", answer["version"], answer["detail"])


# ---- what runs in the other process --------------------------------------------------------------------------------

_CHILD = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
module, code = sys.argv[2:]
scope = {{"version": None, "detail": "", "remedy": None}}
try:
    exec(code, scope)
    answer = {{"state": "ok", "version": scope["version"], "detail": scope["detail"]}}
except ModuleNotFoundError as error:
    parents = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
    state = "missing" if error.name in parents or scope.get("distribution") == error.name else "broken"
    answer = {{"state": state, "detail": str(error)}}
except BaseException as error:
    text = str(error) if "state" in scope else f"{{type(error).__name__}}: {{error}}"
    answer = {{"state": scope.get("state", "broken"), "detail": text, "remedy": scope["remedy"]}}
print("\\n{MARK}" + json.dumps(answer), flush=True)
"""

_PROVIDERS = "detail = ', '.join(onnxruntime.get_available_providers())"
# Without its telemetry, which reports every import to a server.
_OPENVINO_IMPORTS = """
import sys
sys.modules["openvino_telemetry"] = None
import openvino
"""
_OPENVINO = "detail = ', '.join(openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'))"
_TORCH = """
available = torch.cuda.is_available()
detail = f"CUDA {torch.version.cuda}, {'available' if available else 'not available'}" if torch.version.cuda else "CPU"
"""
# Both packages are one module: whichever was installed last has written over the other.
_ONNXRUNTIME_GPU = """
import importlib.metadata
distribution = "onnxruntime-gpu"
version = importlib.metadata.version(distribution)
import onnxruntime
"""
_PROVIDERS_GPU = """
if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
    from bdexport.packages import install_line
    remedy = f"pip uninstall -y onnxruntime onnxruntime-gpu, then {install_line('gpu')}"
    raise RuntimeError("its CUDA provider is not there: the package onnxruntime has replaced it")
detail = "CUDA provider is there"
"""
_CUDA_IMPORTS = """
import importlib.metadata
import cuda.bindings.driver as driver
version = importlib.metadata.version("cuda-bindings")
"""
_CUDA = """
try:
    code, = driver.cuInit(0)
    detail = "CUDA starts" if int(code) == 0 else f"CUDA does not start: {code.name}"
except RuntimeError as error:
    detail = f"CUDA does not start: {error}"
"""
_PYCUDA = """
import pycuda
version = pycuda.VERSION_TEXT
"""
_BACKEND = """
from bdexport.backends import backend_class
backend = backend_class({name!r})()
found = backend.available()
if not found.ok:
    builds, remedy = backend.can_build(), found.remedy
    state = "build only" if builds.ok else "missing"
    raise RuntimeError("engines can be built here, not run: " * builds.ok + found.reason)
version = ", ".join(" ".join(pair) for pair in backend.versions().items())  # imports what it needs
detail = found.reason
"""


def _package(
    extra: str, name: str, module: str, detail: str, *, imports: str | None = None, package: str | None = None
) -> Probe:
    first = imports or f"import {module}"
    version = "" if "version =" in first else f"version = {module}.__version__"
    install = install_line(extra)
    reinstall = f"pip install --force-reinstall {package or name}"
    return Probe(name, extra, module, "\n".join((first, version, detail)), install, reinstall)


def _backend_probes() -> Iterator[Probe]:
    try:
        from bdexport.backends import BACKENDS
    except ImportError:  # numpy is broken, as its own line says
        return
    for name in BACKENDS:
        remedy = f"see the package {name} above"
        yield Probe(name, "backend", "bdexport.backends", _BACKEND.format(name=name), remedy, remedy)


# ---- findings ------------------------------------------------------------------------------------------------------


def _beyond_doctor(remedy: str | None) -> str | None:
    """The remedy without the advice to run this command."""
    return remedy.removesuffix("; run `bdexport doctor`") if remedy is not None else None


def _broken(probe: Probe, detail: str, remedy: str | None = None) -> Finding:
    detail = " ".join(detail.split())
    if remedy is None:
        no_driver = "libcuda.so" in detail and "cannot open" in detail
        remedy = "install the NVIDIA driver: this package needs one" if no_driver else probe.reinstall
    return Finding(probe.name, probe.group, "broken", detail=detail[:300], remedy=remedy)


def _last_words(returncode: int, stderr: str) -> str:
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    if returncode >= 0:
        return f"ended with exit code {returncode} while loading: {last or 'it said nothing'}"
    names = {int(number): number.name for number in signal.Signals}
    return f"crashed while loading ({names.get(-returncode, f'signal {-returncode}')}){': ' if last else ''}{last}"


def _python() -> Finding:
    version, oldest = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info >= OLDEST_PYTHON:
        return Finding("python", "core", "ok", version, sys.executable)
    return Finding("python", "core", "broken", version, f"needs {oldest}", f"install Python {oldest} or newer")


def _bdexport() -> Finding:
    return Finding("bdexport", "core", "ok", __version__, str(Path(__file__).parent))


def _in_groups(findings: list[Finding], gpus: GpuReport) -> Iterator[Finding]:
    """Packages, then what CUDA needs besides them, then backends."""
    yield from (finding for finding in findings if finding.group != "backend")
    yield _driver(gpus)
    yield _nvcc()
    yield from (finding for finding in findings if finding.group == "backend")


def _driver(gpus: GpuReport) -> Finding:
    if gpus.gpus:
        names = ", ".join(f"{gpu.name} (compute {gpu.compute_capability}, {gpu.memory_mib} MiB)" for gpu in gpus.gpus)
        return Finding("NVIDIA driver", "gpu", "ok", gpus.gpus[0].driver, names)
    state: State = "broken" if gpus.installed else "missing"
    return Finding("NVIDIA driver", "gpu", state, None, gpus.reason, "install the NVIDIA driver; not needed on a CPU")


def _nvcc() -> Finding:
    """The CUDA compiler: PyCUDA is compiled with it when it is installed."""
    places = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    search = os.pathsep.join([*map(str, places), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    program = shutil.which("nvcc", path=search)
    if program is None:
        remedy = "install NVIDIA's CUDA toolkit; only PyCUDA needs it"
        return Finding("nvcc", "pycuda", "missing", remedy=remedy)
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        detail = f"{program}: {' '.join(str(error).split())}"
        return Finding("nvcc", "pycuda", "broken", None, detail, "install NVIDIA's CUDA toolkit again")
    release = re.search(r"release ([\d.]+)", said)
    return Finding("nvcc", "pycuda", "ok", release.group(1) if release else None, program)
