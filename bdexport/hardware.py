"""What this machine has: processor, cores and memory that this process may use, NVIDIA GPUs, package versions.

Numbers of a benchmark and engines that were compiled for one processor both need to say where they come from.
Nothing here raises because something is absent.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Instruction sets that ONNX Runtime's and torch's kernels are chosen by (x86; then ARM).
ISA_FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx_ne_convert", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
GPU_FIELDS = ("name", "memory.total", "driver_version", "compute_cap", "clocks.sm", "clocks.max.sm", "clocks.mem")
NVIDIA_SMI_TIMEOUT_S = 20.0
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi reports it; None where it says nothing. Memory in MiB, clocks in MHz."""

    name: str
    memory_mib: int | None
    driver: str
    compute_capability: str | None
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    memory_clock_mhz: int | None


@dataclass(frozen=True)
class GpuReport:
    """The GPUs, and if there are none, why: ``installed`` tells a driver that fails from one that is not there."""

    gpus: tuple[Gpu, ...]
    installed: bool
    reason: str


def machine() -> dict[str, Any]:
    """What a result should say about the machine, as a JSON object. Memory in bytes."""
    cpu = _cpu_description()
    return {
        "cpu": cpu["name"],
        "isa": [flag for flag in ISA_FLAGS if flag in cpu["flags"]],
        "cores": usable_cores(),
        "cores_of_machine": os.cpu_count(),
        "memory_bytes": usable_memory(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def cpu_fingerprint() -> str:
    """Processor and instruction sets that an engine compiled here may depend on, readable and comparable."""
    cpu = _cpu_description()
    flags = " ".join(flag for flag in ISA_FLAGS if flag in cpu["flags"])
    digest = hashlib.sha256(f"{platform.machine()}|{cpu['vendor']}|{cpu['model']}|{flags}".encode()).hexdigest()[:12]
    return f"{platform.machine()} {cpu['name']} [{digest}]"


def usable_cores() -> int:
    """Cores that this process gets: its affinity mask, cut by the quota of its control group; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def usable_memory() -> int | None:
    """Bytes that this process may use: the machine's memory, cut by the limit of its control group."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        total = 0
    return min((limit for limit in (total, *_cgroup_memory()) if limit > 0), default=None)


def available_memory() -> int | None:
    """Bytes that this process can still get: what the kernel calls available, cut by control groups and ulimit -v."""
    found = [_entry(PROC / "meminfo", "MemAvailable")]
    for version, limit, used, cache in (
        (2, "memory.max", "memory.current", "inactive_file"),
        (1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _cgroup_folders("memory", version):
            most, now = _number(_text(folder / limit)), _number(_text(folder / used))
            if most and now:
                reclaimable = _number(dict(map(str.split, _text(folder / "memory.stat").splitlines())).get(cache)) or 0
                found.append(most - now + reclaimable)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        found.append(address_space - (_entry(PROC / "self/status", "VmSize") or 0))
    return min((max(0, value) for value in found if value is not None), default=None)


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine; empty when there is none or the driver does not answer."""
    return gpu_report().gpus


def gpu_report() -> GpuReport:
    """:func:`gpus` and the reason when there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return GpuReport((), installed=False, reason="no nvidia-smi: no NVIDIA driver is installed")
    command = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return GpuReport((), installed=True, reason=f"nvidia-smi did not answer within {NVIDIA_SMI_TIMEOUT_S:.0f} s")
    except OSError as error:
        return GpuReport((), installed=True, reason=f"nvidia-smi cannot be run ({error.strerror})")
    found = tuple(gpu for gpu in map(_gpu, result.stdout.splitlines()) if gpu is not None)
    if result.returncode != 0 or not found:
        said = " ".join((result.stderr or result.stdout).split())[:200]
        return GpuReport((), installed=True, reason=f"nvidia-smi: {said or 'reports no GPU'}")
    return GpuReport(found, installed=True, reason=f"{len(found)} found")


def gpu_to_json(gpu: Gpu) -> dict[str, Any]:
    """A GPU as a JSON object."""
    return asdict(gpu)


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the installed distributions among ``names``; nothing is imported, the absent are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _gpu(line: str) -> Gpu | None:
    values = [None if "N/A" in value or not value.strip() else value.strip() for value in line.split(",")]
    if len(values) != len(GPU_FIELDS) or values[0] is None:
        return None
    return Gpu(
        name=values[0],
        memory_mib=_number(values[1]),
        driver=values[2] or "unknown",
        compute_capability=values[3],
        sm_clock_mhz=_number(values[4]),
        max_sm_clock_mhz=_number(values[5]),
        memory_clock_mhz=_number(values[6]),
    )


def _cpu_description() -> dict[str, Any]:
    """``vendor``, ``model`` (family and model number), ``name`` and ``flags`` from /proc/cpuinfo or what there is."""
    fields: dict[str, str] = {}
    for line in _text(PROC / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if not line.strip() and fields:
            break  # the first processor says it all
        fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {
        "vendor": fields.get("vendor_id") or fields.get("CPU implementer", ""),
        "model": "/".join(fields.get(key, "") for key in ("cpu family", "model", "CPU part")),
        "name": " ".join(name.split()),
        "flags": set((fields.get("flags") or fields.get("Features", "")).split()),
    }


def _cgroup_cores() -> float | None:
    """Cores that the control group's quota amounts to: the least of the group and those above it; None without one."""
    shares = [_text(folder / "cpu.max").partition(" ")[::2] for folder in _cgroup_folders("cpu", version=2)]
    shares += [
        (_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))
        for folder in _cgroup_folders("cpu", version=1)
    ]
    numbers = [(_number(quota), _number(period)) for quota, period in shares]
    return min((quota / period for quota, period in numbers if quota and period), default=None)


def _cgroup_memory() -> list[int]:
    """Limits in bytes of the control group and those above it."""
    paths = [folder / "memory.max" for folder in _cgroup_folders("memory", version=2)]
    paths += [folder / "memory.limit_in_bytes" for folder in _cgroup_folders("memory", version=1)]
    return [limit for limit in map(_number, map(_text, paths)) if limit]


def _cgroup_folders(controller: str, version: int) -> list[Path]:
    """The control group of this process and those above it. See cgroups(7), /proc/PID/cgroup."""
    folders: list[Path] = []
    for line in _text(PROC / "self/cgroup").splitlines():
        controllers, _, place = line.partition(":")[2].partition(":")
        if version == 2 and controllers == "":
            root = CGROUPS
        elif version == 1 and controller in controllers.split(","):
            root = CGROUPS / controller
        else:
            continue
        own = root / place.strip("/")
        folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return folders


def _entry(path: Path, name: str) -> int | None:
    """An entry in kB of one of the kernel's tables, in bytes."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(":")
        if key == name:
            kilobytes = _number(value.strip())
            return None if kilobytes is None else 1024 * kilobytes
    return None


def _text(path: Path) -> str:
    """A small file of the kernel's; nothing when it is not there."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(text: str | None) -> int | None:
    """The whole positive number that a text begins with; None for "max", "-1", nothing."""
    match = re.match(r"\d+", text or "")
    return (int(match.group()) or None) if match else None
