"""What is asked of cuda-python, and of the GPU probes' own calls, on the real package: it takes every argument."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driver_without_gpu import VERSION, DriverWithoutGpu, standing_in

from bdexport.cuda import why_no_cuda
from bdexport.cuda.through_bindings import BindingsCuda
from bdexport.errors import BackendError

has_bindings = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
pytestmark = pytest.mark.skipif(not has_bindings, reason="cuda-python is not installed")


@pytest.fixture
def driver() -> Iterator[DriverWithoutGpu]:
    error = why_no_cuda()
    if error is None or "no NVIDIA driver" not in error.what:
        pytest.skip("this machine has an NVIDIA driver: tests/gpu call it")
    with standing_in() as double:
        yield double


@pytest.fixture
def cuda(driver: DriverWithoutGpu) -> Iterator[BindingsCuda]:
    opened = BindingsCuda(0, "asked for by name")
    yield opened
    opened.close()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, repository: Path) -> Any:
    """The module benchmarks/gpu_probe_driver.py."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    yield importlib.import_module("gpu_probe_driver")
    for name in [name for name in sys.modules if name.startswith("gpu_") and name != "gpu_report"]:
        monkeypatch.delitem(sys.modules, name)


def test_the_interface_calls_what_the_package_has(driver: DriverWithoutGpu, cuda: BindingsCuda) -> None:
    """Oracle: cuda-bindings, which converts every argument before it misses the driver; and the values copied."""
    assert (cuda.device_name(), cuda.compute_capability(), cuda.driver_version()) == ("no GPU", (9, 0), VERSION)
    assert cuda.memory() == (1 << 30, 1 << 30)
    stream, foreign = cuda.stream(), cuda.wrap_stream(4096)
    memory, pinned = cuda.allocate(4096), cuda.pinned(4096)
    pinned.array[...] = 7
    cuda.copy_to_device(memory.pointer, pinned.array[:1024], stream)
    cuda.copy_on_device(memory.pointer + 2048, memory.pointer, 1024, stream)
    got = np.zeros(4096, np.uint8)
    cuda.copy_to_host(got, memory.pointer, stream)
    assert got.reshape(4, 1024)[:, 0].tolist() == [7, 0, 7, 0]
    begin, end = cuda.event(), cuda.event()
    begin.record(stream)
    end.record(stream)
    stream.wait(begin)
    end.synchronize()
    assert end.reached()
    assert begin.elapsed_ms(end) == 0.5
    cuda.order(stream.handle, foreign.handle)
    stream.synchronize()
    for item in (begin, end, stream, foreign):
        item.close()
    for buffer in (memory, pinned):
        buffer.free()
    assert driver.calls["cuStreamDestroy"] == 1  # the caller's stream is the caller's
    assert driver.calls["cuEventCreate"] == driver.calls["cuEventDestroy"] == 3


def test_rows_and_graphs_call_what_the_package_has(driver: DriverWithoutGpu, cuda: BindingsCuda) -> None:
    """Oracle: as above, for the kernels that NVRTC compiles and for captures, also for one that fails."""
    stream, memory = cuda.stream(), cuda.allocate(4096)
    try:
        cuda.gather_rows(memory.pointer, memory.pointer, memory, 64, 3, stream)
    except BackendError as error:
        if "NVRTC cannot be loaded" not in str(error):
            raise
        pytest.skip(str(error))
    cuda.scatter_rows(memory.pointer, memory.pointer, memory, 64, 3, stream)
    with cuda.capture(stream) as capture:
        cuda.copy_on_device(memory.pointer, memory.pointer + 512, 512, stream)
    capture.graph.launch(stream)
    capture.graph.close()
    with pytest.raises(RuntimeError, match="ours"), cuda.capture(stream):
        raise RuntimeError("ours")
    calls = driver.calls
    assert calls["cuStreamBeginCapture"] == calls["cuStreamEndCapture"] == calls["cuGraphDestroy"] == 2
    assert calls["cuGraphInstantiate"] == calls["cuGraphUpload"] == calls["cuGraphExecDestroy"] == 1


def test_the_probes_call_what_the_package_has(driver: DriverWithoutGpu, cuda: BindingsCuda, probe: Any) -> None:
    """Oracle: as above; the probes' own checks of what the mask's kernel wrote; one row for each thing measured."""
    stream = cuda.stream()
    _, kernels = cuda.load(b"an image", ("tiny", "write_mask", "set_conditions"))
    rows = probe._launches(cuda, stream, kernels["tiny"], 2)
    rows += probe._mask_to_host(cuda, stream, kernels["write_mask"], 2)
    rows += probe._new_graphs(cuda, stream, kernels["tiny"], 2)
    assert len(rows) == len({row["what"] for row in rows}) == 7
    memory, mask_memory, mask = cuda.allocate(4096), cuda.allocate(4096), cuda.pinned(probe.MASK_BYTES)
    graph = probe._ConditionalGraph(
        cuda, stream, kernels["tiny"], kernels["set_conditions"], memory.pointer, mask_memory
    )
    probe._masked(cuda, stream, graph, mask, mask_memory.pointer, probe.KEPT)(0)
    graph.close()
    assert bytes(ctypes.string_at(mask_memory.pointer, probe.MASK_BYTES)).count(1) == probe.KEPT
    assert driver.calls["cuGraphAddNode"] == driver.calls["cuGraphConditionalHandleCreate"] == probe.BLOCKS


def test_the_probes_kernels_compile(probe: Any) -> None:
    """Oracle: NVRTC, for Hopper; the conditions' kernel calls a function of CUDA's device run time."""
    from bdexport.cuda.kernels import compiled

    for source, names in ((probe.KERNELS, ("tiny", "write_mask")), (probe.CONDITIONS, ("set_conditions",))):
        try:
            image = compiled(source, (9, 0))
        except BackendError as error:
            if "NVRTC cannot be loaded" not in str(error):
                raise
            pytest.skip(str(error))
        assert image.startswith(b"\x7fELF")
        for name in names:
            assert name.encode() in image
