"""What single operations cost on this GPU: the numbers that decide how paths are run.

    python benchmarks/gpu_probe.py [--rounds 200] [--json FILE]

    launches       a tiny kernel 54 times: plain launches, and one graph of them; per kernel
    conditionals   one graph of 54 IF nodes in a row whose conditions a kernel sets from a mask in device memory:
                   all taken, a third taken, none taken, beside the graph of the same kernels without conditions
    mask to host   64 bytes: copied to pinned memory with a synchronisation, and written by a kernel into mapped
                   pinned memory that the host polls
    new graph      capture, instantiation and upload for a path of 17 and of 54 kernels
    torch          a small residual block 54 times: eager, and as one CUDA graph
    onnxruntime    one Run with IOBinding of a tiny graph on the CUDA provider
    tensorrt(-rtx) does an engine of a small network load and run here; a part enqueued 54 times, plain and as a graph

Times are on the host's clock in us, from the call until the device is done. What this machine lacks is skipped with the
reason. The conditional graph is an experiment: it is no executor unless it wins here. Prints a table last, writes JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_common import (
    RESULTS,
    Skipped,
    in_turn,
    make_checkpoint,
    summary,
    surroundings,
    torch_cuda_reason,
    what_is_missing,
)

from bdexport.cuda.driver_api import checked
from bdexport.cuda.kernels import compiled
from bdexport.errors import BackendError
from bdexport.files import write_json

if TYPE_CHECKING:
    from bdexport.cuda.base import Stream
    from bdexport.cuda.through_bindings import BindingsCuda

SCHEMA = "bdexport.benchmark.gpu_probe/1"
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


def main() -> None:
    arguments = _arguments()
    missing = what_is_missing()
    if missing is not None:
        sys.exit(f"gpu_probe.py: no GPU can be used, nothing was measured: {missing}")
    skipped, rows = Skipped(), []
    probes: dict[str, Callable[[int], list[Row]]] = {
        "driver": _driver_probes,
        "conditionals": _conditional_probe,
        "torch": _torch_probe,
        "onnxruntime": _onnxruntime_probe,
        "tensorrt": lambda rounds: _engine_probe("tensorrt", rounds),
        "tensorrt-rtx": lambda rounds: _engine_probe("tensorrt-rtx", rounds),
    }
    for name, probe in probes.items():
        print(f"gpu_probe.py: {name} ...", file=sys.stderr)
        with skipped.unless_it_fails(name):
            rows += probe(arguments.rounds)
        # After each, so that a run that is cut short leaves what it has.
        data = {"schema": SCHEMA, "rounds": arguments.rounds, **surroundings()}
        write_json(arguments.json, data | {"results": rows, "skipped": skipped.reasons})
    _print(rows, skipped, arguments.json)
    if not rows:
        sys.exit("gpu_probe.py: nothing could be measured; the reasons are above")


def _row(what: str, seconds: list[float], per: int = 1, note: str = "") -> Row:
    """``per``: how many of the thing one call holds."""
    times = {name: 1e3 * value for name, value in summary(seconds).items()}
    return {"what": what, "us": times, "count": per, "us_each": times["p50"] / per, "note": note}


# ---- the driver's own operations, through cuda-python -------------------------------------------------------------


@contextmanager
def _cuda() -> Iterator[tuple[BindingsCuda, Stream]]:
    from bdexport.cuda.through_bindings import on_device

    with on_device() as cuda, closing(cuda.stream()) as stream:
        yield cuda, stream


def _driver_probes(rounds: int) -> list[Row]:
    with _cuda() as (cuda, stream):
        _, kernels = cuda.load(compiled(KERNELS, cuda.compute_capability()), ("tiny", "write_mask"))
        rows = _launches(cuda, stream, kernels["tiny"], rounds)
        rows += _mask_to_host(cuda, stream, kernels["write_mask"], rounds)
        return rows + _new_graphs(cuda, stream, kernels["tiny"], rounds)


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
        _row("kernel, launch and wait", times["one"]),
        _row(f"{BLOCKS} kernels, plain", times["plain"], BLOCKS),
        _row(f"{BLOCKS} kernels, one graph", times["graph"], BLOCKS),
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
        _row("mask to host: kernel, copy, wait", times["copied"]),
        _row("mask to host: kernel into mapped memory, polled", times["polled"]),
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
        _row(f"new graph of {count} kernels: capture, instantiate, upload", times[str(count)])
        for count in (KEPT, BLOCKS)
    ]


# ---- one graph with conditions ------------------------------------------------------------------------------------


def _conditional_probe(rounds: int) -> list[Row]:
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
            _row(f"{BLOCKS} conditions, all taken", times["all"], BLOCKS, note),
            _row(f"{BLOCKS} conditions, {KEPT} taken", times["third"], BLOCKS, note),
            _row(f"{BLOCKS} conditions, none taken", times["none"], BLOCKS, note),
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


# ---- what runs the parts ------------------------------------------------------------------------------------------


def _torch_probe(rounds: int) -> list[Row]:
    reason = torch_cuda_reason()
    if reason is not None:
        raise BackendError(reason)
    import torch

    from bdexport.architecture import resnet_spec
    from bdexport.models.pair import BlockDropNet
    from bdexport.partition import part_module

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as the backends compute
    model = BlockDropNet(resnet_spec("resnet110")).eval()
    block = part_module(model, "block_01").cuda()
    x = torch.randn(1, 16, 32, 32, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def chain(y: Any) -> Any:
        for _ in range(BLOCKS):
            y = block(y)
        return y

    with torch.inference_mode():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                chain(x)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            chain(x)

        def eager(turn: int) -> None:
            with torch.inference_mode(), torch.cuda.stream(stream):
                chain(x)
            stream.synchronize()

        def replayed(turn: int) -> None:
            with torch.cuda.stream(stream):
                graph.replay()
            stream.synchronize()

        times = in_turn({"eager": eager, "graph": replayed}, rounds, 10)
    return [
        _row(f"torch: {BLOCKS} blocks of ResNet-110's first stage, eager", times["eager"], BLOCKS),
        _row(f"torch: {BLOCKS} blocks of ResNet-110's first stage, one graph", times["graph"], BLOCKS),
    ]


def _onnxruntime_probe(rounds: int) -> list[Row]:
    return _session_rows("onnxruntime", rounds)


def _engine_probe(backend: str, rounds: int) -> list[Row]:
    return _session_rows(backend, rounds)


def _session_rows(backend: str, rounds: int) -> list[Row]:
    """A block of ResNet-110's shape behind itself, by a backend's session; the build has verified it against torch."""
    import bdexport
    from bdexport.build import build_bundle
    from bdexport.config import BuildConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = BuildConfig(backend=backend, max_batch=8 if backend.startswith("tensorrt") else None)
        bundle = build_bundle(
            make_checkpoint("resnet20", folder), folder / "bundle", config=config, cache_dir=folder / "c"
        )
        with bdexport.load(bundle.path, device="cuda", executor="chain") as orchestrator:
            session: Any = orchestrator.session
            parts = ["block_01"] * BLOCKS
            x = session.put("block_01", np.zeros((1, *orchestrator.manifest.parts["block_01"].input.shape), np.float32))
            calls: dict[str, Callable[[int], object]] = {
                "one": lambda turn: session.get("block_01", session.run("block_01", x)),
                "plain": lambda turn: session.get("block_01", session.run_path(parts, x)),
            }
            possible, reason = session.can_capture()
            if possible:
                path = session.capture_path(parts, 1)
                calls["graph"] = lambda turn: session.get("block_01", path.run(x))
            times = in_turn(calls, rounds, 10)
    note = "with the copy of the result to the host"
    rows = [
        _row(f"{backend}: one block", times["one"], 1, note),
        _row(f"{backend}: {BLOCKS} blocks, plain", times["plain"], BLOCKS, note),
    ]
    if "graph" in times:
        return [*rows, _row(f"{backend}: {BLOCKS} blocks, one graph", times["graph"], BLOCKS, note)]
    print(f"  {backend}: no graph ({reason})", file=sys.stderr)
    return rows


# ---- output -------------------------------------------------------------------------------------------------------


def _print(rows: list[Row], skipped: Skipped, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 140)  # rows in one line each, in a file or a log too
    for name, reason in skipped.reasons.items():
        console.print(f"skipped: {name}: {reason}", markup=False, highlight=False)
    table = Table(title=f"us on the host's clock; JSON in {path}")
    table.add_column("what")
    for column in ("p50", "p99", "each"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["what"], f"{row['us']['p50']:.1f}", f"{row['us']['p99']:.1f}", f"{row['us_each']:.2f}")
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu_probe.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
