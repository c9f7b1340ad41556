"""The driver's own operations, through cuda-python: launches, graphs, the mask's way to the host, conditional nodes.

For ``gpu_probe.py``, which says what each of them is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_common import in_turn, summary

from bdexport.cuda.driver_api import checked
from bdexport.cuda.kernels import compiled
from bdexport.errors import BackendError

if TYPE_CHECKING:
    from bdexport.cuda.base import Stream
    from bdexport.cuda.through_bindings import BindingsCuda

BLOCKS, KEPT, MASK_BYTES = 54, 17, 64
POLL_LIMIT_S = 1.0
LEAST_DRIVER = 12080  # IF nodes from 12.4 on; before 12.8 (r570), an empty body was seen to hang
KERNELS = """
extern "C" __global__ void tiny(float* x) { x[threadIdx.x] += 1.0f; }

extern "C" __global__ void write_mask(unsigned char* target, volatile unsigned int* flag, unsigned int turn) {
    target[threadIdx.x] = (unsigned char)turn;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) *flag = turn;
}
"""
CONDITIONS = """
extern "C" __device__ __cudart_builtin__ void CUDARTAPI cudaGraphSetConditional(
    cudaGraphConditionalHandle handle, unsigned int value);

extern "C" __global__ void set_conditions(
    const cudaGraphConditionalHandle* handles, const unsigned char* mask, int count) {
    if (threadIdx.x < count) cudaGraphSetConditional(handles[threadIdx.x], mask[threadIdx.x]);
}
"""
Row = dict[str, Any]


def probe_row(what: str, seconds: list[float], per: int = 1, note: str = "") -> Row:
    """One line of the result, in us. ``per``: how many of the thing one call holds."""
    times = {name: 1e3 * value for name, value in summary(seconds).items()}
    return {"what": what, "us": times, "count": per, "us_each": times["p50"] / per, "note": note}


@contextmanager
def _cuda() -> Iterator[tuple[BindingsCuda, Stream]]:
    from bdexport.cuda.through_bindings import on_device

    with on_device() as cuda, closing(cuda.stream()) as stream:
        yield cuda, stream


def driver_probes(rounds: int) -> Iterator[Row]:
    """One by one: what was measured before a failure counts. Mapped memory is last: not every machine has it."""
    with _cuda() as (cuda, stream):
        _, kernels = cuda.load(compiled(KERNELS, cuda.compute_capability()), ("tiny", "write_mask"))
        yield from _launches(cuda, stream, kernels["tiny"], rounds)
        yield from _new_graphs(cuda, stream, kernels["tiny"], rounds)
        yield from _mask_to_host(cuda, stream, kernels["write_mask"], rounds)


def _launches(cuda: BindingsCuda, stream: Stream, tiny: Any, rounds: int) -> list[Row]:
    memory = cuda.allocate(4096)
    argument = ctypes.c_void_p(memory.pointer)

    def queue(count: int) -> None:
        for _ in range(count):
            cuda.launch(tiny, (1, 1), 32, (argument,), stream)

    queue(1)
    stream.synchronize()
    with cuda.capture(stream) as capture:
        queue(BLOCKS)
    graph = capture.graph

    def one(turn: int) -> None:
        queue(1)
        stream.synchronize()

    def plain(turn: int) -> None:
        queue(BLOCKS)
        stream.synchronize()

    def as_graph(turn: int) -> None:
        graph.launch(stream)
        stream.synchronize()

    times = in_turn({"one": one, "plain": plain, "graph": as_graph}, rounds, 20)
    graph.close()
    memory.free()
    return [
        probe_row("kernel, launch and wait", times["one"]),
        probe_row(f"{BLOCKS} kernels, plain", times["plain"], BLOCKS),
        probe_row(f"{BLOCKS} kernels, one graph", times["graph"], BLOCKS),
    ]


def _mask_to_host(cuda: BindingsCuda, stream: Stream, write_mask: Any, rounds: int) -> list[Row]:
    api = cuda.api
    mapped = int(api.CU_MEMHOSTALLOC_DEVICEMAP)
    pinned = int(checked(api, api.cuMemHostAlloc(4096, mapped), "mapped memory"))
    device = int(checked(api, api.cuMemHostGetDevicePointer(pinned, 0), "address of mapped memory"))
    host: Any = np.ctypeslib.as_array((ctypes.c_uint8 * 4096).from_address(pinned))
    host[...] = 0
    flag = host[1024:1028].view(np.uint32)
    target = cuda.pinned(MASK_BYTES)
    memory = cuda.allocate(4096)
    turns = iter(range(1, 1 << 30))

    def write(mask: int, flag_at: int, turn: int) -> None:
        arguments = (ctypes.c_void_p(mask), ctypes.c_void_p(flag_at), ctypes.c_uint(turn))
        cuda.launch(write_mask, (1, 1), MASK_BYTES, arguments, stream)

    def copied(_: int) -> None:
        turn = next(turns)
        write(memory.pointer, memory.pointer + 1024, turn)
        cuda.copy_to_host(target.array, memory.pointer, stream)
        stream.synchronize()
        assert target.array[-1] == turn % 256

    def polled(_: int) -> None:
        turn = next(turns)
        write(device, device + 1024, turn)
        deadline = perf_counter() + POLL_LIMIT_S
        while flag[0] != turn:
            if perf_counter() > deadline:
                raise BackendError("the flag in mapped memory did not change within a second")
        assert host[MASK_BYTES - 1] == turn % 256

    try:
        times = in_turn({"copied": copied, "polled": polled}, rounds, 20)
    finally:
        stream.synchronize()
        memory.free()
        target.free()
        api.cuMemFreeHost(pinned)
    return [
        probe_row("mask to host: kernel, copy, wait", times["copied"]),
        probe_row("mask to host: kernel into mapped memory, polled", times["polled"]),
    ]


def _new_graphs(cuda: BindingsCuda, stream: Stream, tiny: Any, rounds: int) -> list[Row]:
    memory = cuda.allocate(4096)
    argument = ctypes.c_void_p(memory.pointer)

    def made(count: int) -> Callable[[int], None]:
        def call(turn: int) -> None:
            with cuda.capture(stream) as capture:
                for _ in range(count):
                    cuda.launch(tiny, (1, 1), 32, (argument,), stream)
            stream.synchronize()
            capture.graph.close()

        return call

    times = in_turn({str(count): made(count) for count in (KEPT, BLOCKS)}, min(rounds, 50), 3)
    memory.free()
    return [
        probe_row(f"new graph of {count} kernels: capture, instantiate, upload", times[str(count)])
        for count in (KEPT, BLOCKS)
    ]


# ---- one graph with conditions ------------------------------------------------------------------------------------


def conditional_probe(rounds: int) -> list[Row]:
    with _cuda() as (cuda, stream):
        if cuda.driver_version() < LEAST_DRIVER:
            raise BackendError(
                "conditional nodes", got=f"driver for {cuda.driver_version()}", expected=f">= {LEAST_DRIVER}"
            )
        _, kernels = cuda.load(compiled(KERNELS, cuda.compute_capability()), ("tiny", "write_mask"))
        _, conditions = cuda.load(compiled(CONDITIONS, cuda.compute_capability()), ("set_conditions",))
        memory, mask_memory = cuda.allocate(4096), cuda.allocate(4096)
        mask = cuda.pinned(MASK_BYTES)
        graph = _ConditionalGraph(
            cuda, stream, kernels["tiny"], conditions["set_conditions"], memory.pointer, mask_memory
        )
        try:
            calls = {
                "all": _masked(cuda, stream, graph, mask, mask_memory.pointer, BLOCKS),
                "third": _masked(cuda, stream, graph, mask, mask_memory.pointer, KEPT),
                "none": _masked(cuda, stream, graph, mask, mask_memory.pointer, 0),
            }
            _check_conditions(cuda, stream, calls, memory.pointer)
            times = in_turn(calls, rounds, 20)
        finally:
            stream.synchronize()
            graph.close()
            for buffer in (memory, mask_memory, mask):
                buffer.free()
        note = "with the copy of the mask to the device and the kernel that sets the conditions"
        return [
            probe_row(f"{BLOCKS} conditions, all taken", times["all"], BLOCKS, note),
            probe_row(f"{BLOCKS} conditions, {KEPT} taken", times["third"], BLOCKS, note),
            probe_row(f"{BLOCKS} conditions, none taken", times["none"], BLOCKS, note),
        ]


class _ConditionalGraph:
    """set_conditions -> IF(0) -> IF(1) -> .. , each body one ``tiny`` kernel."""

    def __init__(
        self, cuda: BindingsCuda, stream: Stream, tiny: Any, setter: Any, memory: int, mask_memory: Any
    ) -> None:
        self._cuda, self._executable = cuda, None
        api = cuda.api
        self._handles = cuda.allocate(8 * BLOCKS)
        context = checked(api, api.cuCtxGetCurrent(), "context")
        self._graph = checked(api, api.cuGraphCreate(0), "graph")
        handles = [
            checked(api, api.cuGraphConditionalHandleCreate(self._graph, context, 0, 0), "condition")
            for _ in range(BLOCKS)
        ]
        numbers = np.array([int(handle) for handle in handles], np.uint64)
        cuda.copy_to_device(self._handles.pointer, numbers, stream)
        stream.synchronize()
        arguments = (ctypes.c_void_p(self._handles.pointer), ctypes.c_void_p(mask_memory.pointer), ctypes.c_int(BLOCKS))
        self._into(self._graph, stream, lambda: cuda.launch(setter, (1, 1), 64, arguments, stream))
        (node,) = self._nodes()
        for handle in handles:
            node = self._condition(handle, context, node, tiny, memory, stream)
        self._executable = checked(api, api.cuGraphInstantiate(self._graph, 0), "graph instantiation")

    def launch(self, stream: Stream) -> None:
        checked(self._cuda.api, self._cuda.api.cuGraphLaunch(self._executable, stream.handle), "graph launch")

    def close(self) -> None:
        if self._executable is not None:
            self._cuda.api.cuGraphExecDestroy(self._executable)
        self._cuda.api.cuGraphDestroy(self._graph)
        self._handles.free()

    def _condition(self, handle: Any, context: Any, after: Any, tiny: Any, memory: int, stream: Stream) -> Any:
        """An IF node behind ``after``; its body is filled by capturing into it."""
        api = self._cuda.api
        params = api.CUgraphNodeParams()
        params.type = api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = handle
        params.conditional.type = api.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        params.conditional.size = 1
        params.conditional.ctx = context
        node = checked(api, _add_node(api, self._graph, after, params), "conditional node")
        body = params.conditional.phGraph_out[0]
        argument = (ctypes.c_void_p(memory),)
        self._into(body, stream, lambda: self._cuda.launch(tiny, (1, 1), 32, argument, stream))
        return node

    def _into(self, graph: Any, stream: Stream, queue: Callable[[], None]) -> None:
        api = self._cuda.api
        mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        checked(api, api.cuStreamBeginCaptureToGraph(stream.handle, graph, None, None, 0, mode), "capture into a graph")
        try:
            queue()
        finally:
            checked(api, api.cuStreamEndCapture(stream.handle), "end of a capture")

    def _nodes(self) -> list[Any]:
        api = self._cuda.api
        _, count = checked(api, api.cuGraphGetNodes(self._graph), "nodes")
        nodes, _ = checked(api, api.cuGraphGetNodes(self._graph, count), "nodes")
        return list(nodes)[:count]


def _add_node(api: Any, graph: Any, after: Any, params: Any) -> tuple[Any, ...]:
    """cuGraphAddNode has an argument for edge data from cuda-bindings 13 on."""
    try:
        result: tuple[Any, ...] = api.cuGraphAddNode(graph, [after], None, 1, params)
    except TypeError:
        result = api.cuGraphAddNode(graph, [after], 1, params)
    return result


def _masked(
    cuda: BindingsCuda, stream: Stream, graph: _ConditionalGraph, mask: Any, target: int, kept: int
) -> Callable[[int], None]:
    values = np.zeros(MASK_BYTES, np.uint8)
    values[np.linspace(0, BLOCKS - 1, kept).astype(int)] = 1

    def call(turn: int) -> None:
        mask.array[...] = values
        cuda.copy_to_device(target, mask.array, stream)
        graph.launch(stream)
        stream.synchronize()

    return call


def _check_conditions(cuda: BindingsCuda, stream: Stream, calls: dict[str, Callable[[int], None]], memory: int) -> None:
    """Each body adds 1: the sum says how many ran."""
    for name, expected in (("all", BLOCKS), ("third", KEPT), ("none", 0)):
        values = np.zeros(32, np.float32)
        cuda.copy_to_device(memory, values, stream)
        calls[name](0)
        cuda.copy_to_host(values, memory, stream)
        stream.synchronize()
        if values[0] != expected:
            raise BackendError(f"conditional nodes: {name}", got=f"{values[0]:.0f} bodies run", expected=expected)
