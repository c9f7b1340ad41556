"""Memory, streams, events, graphs and kernels on a real GPU, through both bindings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cuda_double import CudaDouble
from gpu_cases import DRY_RUN

from bdexport.cuda import Cuda, open_cuda
from bdexport.errors import BackendError

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda-python", "pycuda"])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    try:
        opened: Cuda = CudaDouble() if DRY_RUN else open_cuda(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def test_copies_there_and_back(cuda: Cuda) -> None:
    """Oracle: the values, through pinned memory and two device buffers."""
    stream, pinned = cuda.stream(), cuda.pinned(4096)
    first, second = cuda.allocate(4096), cuda.allocate(4096)
    assert first.pointer % 256 == 0
    values = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    pinned.array[...] = values
    cuda.copy_to_device(first.pointer, pinned.array, stream)
    cuda.copy_on_device(second.pointer, first.pointer, 4096, stream)
    got = np.zeros(4096, np.uint8)
    cuda.copy_to_host(got, second.pointer, stream)
    stream.synchronize()
    assert np.array_equal(got, values)
    for item in (first, second, pinned, stream):
        (item.close if hasattr(item, "close") else item.free)()


@pytest.mark.parametrize("row_bytes", [40, 48, 4096, 16384 * 4])
def test_rows_are_gathered_and_scattered(cuda: Cuda, row_bytes: int) -> None:
    """Oracle: numpy indexing; rows that 16 bytes divide and that they do not."""
    stream, count = cuda.stream(), 37
    values = np.random.default_rng(0).random((count, row_bytes // 4), np.float32)
    rows = np.random.default_rng(1).permutation(count)[:20].astype(np.int32)
    source, target, back, numbers = (cuda.allocate(size) for size in (values.nbytes, values.nbytes, values.nbytes, 256))
    cuda.copy_to_device(source.pointer, values, stream)
    cuda.copy_to_device(back.pointer, np.zeros_like(values), stream)
    cuda.copy_to_device(numbers.pointer, rows, stream)
    cuda.gather_rows(target.pointer, source.pointer, numbers, row_bytes, len(rows), stream)
    cuda.scatter_rows(back.pointer, target.pointer, numbers, row_bytes, len(rows), stream)
    gathered, scattered = np.zeros((len(rows), row_bytes // 4), np.float32), np.zeros_like(values)
    cuda.copy_to_host(gathered, target.pointer, stream)
    cuda.copy_to_host(scattered, back.pointer, stream)
    stream.synchronize()
    assert np.array_equal(gathered, values[rows])
    expected = np.zeros_like(values)
    expected[rows] = values[rows]
    assert np.array_equal(scattered, expected)
    for buffer in (source, target, back, numbers):
        buffer.free()
    stream.close()


def test_graphs_run_what_was_captured(cuda: Cuda) -> None:
    """Oracle: a captured copy does nothing when captured, and copies what is there when launched."""
    possible, reason = cuda.can_capture()
    if not possible:
        pytest.skip(reason)
    stream = cuda.stream()
    source, target = cuda.allocate(4096), cuda.allocate(4096)
    cuda.copy_to_device(target.pointer, np.zeros(4096, np.uint8), stream)
    stream.synchronize()
    with cuda.capture(stream) as capture:
        cuda.copy_on_device(target.pointer, source.pointer, 4096, stream)
    got = np.ones(4096, np.uint8)
    cuda.copy_to_host(got, target.pointer, stream)
    stream.synchronize()
    assert not got.any()
    for value in (3, 7):
        cuda.copy_to_device(source.pointer, np.full(4096, value, np.uint8), stream)
        capture.graph.launch(stream)
        cuda.copy_to_host(got, target.pointer, stream)
        stream.synchronize()
        assert (got == value).all()
    capture.graph.close()


def test_a_refused_capture_leaves_the_stream_usable(cuda: Cuda) -> None:
    """Oracle: synchronising inside a capture is refused by CUDA; the next copy works."""
    possible, reason = cuda.can_capture()
    if not possible:
        pytest.skip(reason)
    stream, memory = cuda.stream(), cuda.allocate(4096)
    with pytest.raises(BackendError), cuda.capture(stream):  # noqa: PT012 (what is refused is in the capture)
        cuda.copy_on_device(memory.pointer, memory.pointer + 2048, 1024, stream)
        stream.synchronize()
    cuda.copy_to_device(memory.pointer, np.full(4096, 5, np.uint8), stream)
    got = np.zeros(4096, np.uint8)
    cuda.copy_to_host(got, memory.pointer, stream)
    stream.synchronize()
    assert (got == 5).all()


def test_events_measure_and_order(cuda: Cuda) -> None:
    """Property: time between two events is positive and finite; a waiting stream sees what was written before."""
    first, second = cuda.stream(), cuda.stream()
    memory = cuda.allocate(1 << 24)
    values = np.full(1 << 24, 9, np.uint8)
    begin, end = cuda.event(), cuda.event()
    begin.record(first)
    cuda.copy_to_device(memory.pointer, values, first)
    end.record(first)
    second.wait(end)
    got = np.zeros(1 << 24, np.uint8)
    cuda.copy_to_host(got, memory.pointer, second)
    second.synchronize()
    assert (got == 9).all()
    assert end.reached()
    assert cuda.event().reached()  # never recorded
    assert 0 < begin.elapsed_ms(end) < 10_000
    memory.free()


def test_out_of_memory_is_said_with_numbers(cuda: Cuda) -> None:
    """Oracle: the text; free memory is what it was, after 200 failures too."""
    _, total = cuda.memory()
    with pytest.raises(BackendError, match="out of device memory"):
        cuda.allocate(2 * total)
    free, _ = cuda.memory()
    for _ in range(200):
        with pytest.raises(BackendError):
            cuda.allocate(2 * total)
    assert abs(cuda.memory()[0] - free) < 1 << 20
