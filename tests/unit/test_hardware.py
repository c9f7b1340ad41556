"""What the machine has, against the operating system's own answers and against control groups made for the test."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest

from bdexport import hardware
from bdexport.hardware import Gpu, cpu_fingerprint, gpu_report, gpus, machine, package_versions, usable_cores

SMI_LINE = "NVIDIA H200, 143771, 570.86.10, 9.0, 345, 1980, 3201"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /proc and /sys/fs/cgroup, and a process that may use eight cores."""
    monkeypatch.setattr(hardware, "PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of that name into the search path."""
    write(folder / "nvidia-smi", f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_machine_agrees_with_the_operating_system() -> None:
    """Oracle: os and platform; and it is JSON."""
    found = machine()
    assert json.loads(json.dumps(found)) == found
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["python"] == platform.python_version()
    assert found["cpu"]
    assert found["memory_bytes"] > 100e6


@pytest.mark.parametrize(
    ("own", "above", "cores"),
    [
        ("max 100000", "max 100000", 8),
        ("200000 100000", "max 100000", 2),
        ("max 100000", "150000 100000", 2),  # one and a half: two threads are of use
        ("400000 100000", "100000 100000", 1),
        ("10000 100000", "max 100000", 1),
        ("1600000 100000", "max 100000", 8),
        ("", "", 8),
    ],
)
def test_quota_version_2(kernel: Path, own: str, above: str, cores: int) -> None:
    """Oracle: the least of quota / period over the group and those above it, and the affinity mask (cgroups(7))."""
    write(kernel / "proc/self/cgroup", "0::/box/app\n")
    write(kernel / "cgroup/box/app/cpu.max", own + "\n")
    write(kernel / "cgroup/box/cpu.max", above + "\n")
    assert usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3)])
def test_quota_version_1(kernel: Path, quota: str, cores: int) -> None:
    """Oracle: cfs_quota_us / cfs_period_us; -1 is no quota."""
    write(kernel / "proc/self/cgroup", "4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n")
    write(kernel / "cgroup/cpu/box/cpu.cfs_quota_us", quota)
    write(kernel / "cgroup/cpu/box/cpu.cfs_period_us", "100000")
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("file", "lines"),
    [("cgroup/memory.max", "0::/\n"), ("cgroup/memory/box/memory.limit_in_bytes", "4:memory:/box\n")],
)
def test_memory_limit(kernel: Path, file: str, lines: str) -> None:
    """Oracle: the group's limit where it is below the machine's memory; "max" and absent mean none."""
    write(kernel / "proc/self/cgroup", lines)
    whole = hardware.usable_memory()
    write(kernel / file, "1048576\n")
    assert hardware.usable_memory() == 1048576
    write(kernel / file, "max\n")
    assert hardware.usable_memory() == whole
    write(kernel / file, "9223372036854771712\n")
    assert hardware.usable_memory() == whole


def test_available_memory(kernel: Path) -> None:
    """Oracle: the least of MemAvailable and, per control group, limit - use + what its cache can give back."""
    assert hardware.available_memory() is None
    write(kernel / "proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert hardware.available_memory() == 4000 * 1024
    write(kernel / "cgroup/memory.max", "max\n")
    write(kernel / "cgroup/memory.current", "1000000\n")
    assert hardware.available_memory() == 4000 * 1024
    write(kernel / "cgroup/memory.max", "3000000\n")
    assert hardware.available_memory() == 2_000_000
    write(kernel / "cgroup/memory.stat", "anon 12\ninactive_file 500000\n")
    assert hardware.available_memory() == 2_500_000


def cpuinfo(flags: str, model: str = "143") -> str:
    one = (
        f"vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: {model}\nmodel name\t: Some  CPU\nflags\t\t: {flags}\n"
    )
    return f"{one}\n{one}"


def test_fingerprint_follows_what_engines_depend_on(kernel: Path) -> None:
    """Properties: the same machine gives the same text; another model or instruction set another; other flags none."""
    prints = []
    for text in (cpuinfo("avx2 avx512f"), cpuinfo("avx512f avx2 arat"), cpuinfo("avx2"), cpuinfo("avx2", "85")):
        write(kernel / "proc/cpuinfo", text)
        prints.append(cpu_fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert "Some CPU" in prints[0]


def test_machine_without_proc(kernel: Path) -> None:
    """Oracle: nothing raises where the kernel says nothing (macOS, Windows)."""
    (kernel / "proc/self/cgroup").unlink()
    assert machine()["cores"] == 8
    assert cpu_fingerprint()


def test_gpu_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the fields of a line as nvidia-smi prints it; N/A is None."""
    nvidia_smi(tmp_path, f"echo '{SMI_LINE}'\necho 'Tesla T4, 15360, 570.86.10, 7.5, [N/A], N/A, '", monkeypatch)
    h200 = Gpu("NVIDIA H200", 143771, "570.86.10", "9.0", 345, 1980, 3201)
    assert gpus() == (h200, Gpu("Tesla T4", 15360, "570.86.10", "7.5", None, None, None))
    assert hardware.gpu_to_json(h200)["compute_capability"] == "9.0"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9", "could not talk"),
        ("echo 'No devices were found'", "No devices were found"),
        ("exit 0", "reports no GPU"),
        ("sleep 30", "did not answer"),
        (f"echo '{SMI_LINE}'; echo broken >&2; exit 6", "broken"),
    ],
)
def test_driver_that_fails_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    """Oracle: what the program said; nothing raises."""
    monkeypatch.setattr(hardware, "NVIDIA_SMI_TIMEOUT_S", 2.0)
    nvidia_smi(tmp_path, script.replace("sleep", "exec sleep"), monkeypatch)
    report = gpu_report()
    assert report.installed
    assert reason in report.reason


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an empty search path has no nvidia-smi; one that cannot be executed is told apart."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not gpu_report().installed
    assert gpus() == ()
    write(tmp_path / "nvidia-smi", "\x7fELF rubbish")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "cannot be run" in gpu_report().reason


def test_package_versions() -> None:
    """Oracle: numpy's own version; what is not installed is left out."""
    assert package_versions(["numpy", "no-such-distribution"]) == {"numpy": np.__version__}
