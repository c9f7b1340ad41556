"""What this process takes of the machine's memory, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def status_kb(field: str) -> int:
    """A field of ``/proc/self/status`` in kB (``VmRSS``, ``VmHWM``, ``VmSize``); 0 where it is missing."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0


def resident_mb() -> float:
    """Memory that is resident now, in MB."""
    return status_kb("VmRSS") / 1024


def reset_peak() -> float:
    """Start a new peak of resident memory; returns the memory that is resident now, in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the kernel does not let us: the peak of the whole process so far
        return status_kb("VmHWM") / 1024
    return resident_mb()


def peak_mb() -> float:
    """The largest resident memory since :func:`reset_peak`, in MB."""
    return status_kb("VmHWM") / 1024
