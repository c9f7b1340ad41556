"""What single operations cost on this GPU: the numbers that decide how paths are run.

    python benchmarks/gpu_probe.py [--only driver conditionals torch onnxruntime ..] [--rounds 200] [--json FILE]

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
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import (
    DEVICE,
    DRY_RUN,
    RESULTS,
    ROOT,
    ResultFile,
    Skipped,
    in_turn,
    make_checkpoint,
    torch_cuda_reason,
    what_is_missing,
)
from gpu_probe_driver import BLOCKS, Row, conditional_probe, driver_probes, probe_row

from bdexport.errors import BackendError
from bdexport.report.benchmarks import PROBE

PROBES = ("driver", "conditionals", "torch", "onnxruntime", "tensorrt", "tensorrt-rtx")


def main() -> None:
    arguments = _arguments()
    missing = what_is_missing()
    if missing is not None:
        sys.exit(f"gpu_probe.py: no GPU can be used, nothing was measured: {missing}")
    skipped, rows = Skipped(), []
    rounds = 2 if DRY_RUN else arguments.rounds
    file = ResultFile(arguments.json, PROBE, {"rounds": rounds, "only": arguments.only})
    probes: dict[str, Callable[[int], Iterable[Row]]] = {
        "driver": driver_probes,
        "conditionals": conditional_probe,
        "torch": _torch_probe,
        "onnxruntime": lambda rounds: _session_rows("onnxruntime", rounds),
        "tensorrt": lambda rounds: _session_rows("tensorrt", rounds),
        "tensorrt-rtx": lambda rounds: _session_rows("tensorrt-rtx", rounds),
    }
    if DRY_RUN:
        probes |= {name: with_stand_in(probes[name]) for name in ("driver", "conditionals")}
    for name in arguments.only:
        print(f"gpu_probe.py: {name} ...", file=sys.stderr)
        with skipped.unless_it_fails(name):
            for row in probes[name](rounds):
                rows.append(row)  # noqa: PERF402 (what comes before a failure stays)
        file.write(rows, skipped.reasons)
    file.write(rows, skipped.reasons, complete=True)
    _print(rows, skipped, arguments.json)
    if not rows:
        sys.exit("gpu_probe.py: nothing could be measured; the reasons are above")


def with_stand_in(probe: Callable[[int], Iterable[Row]]) -> Callable[[int], list[Row]]:
    """The probe on a stand-in for the driver, which takes every call and measures nothing: for a dry run."""

    def call(rounds: int) -> list[Row]:
        if str(ROOT / "tests") not in sys.path:
            sys.path.append(str(ROOT / "tests"))
        from driver_without_gpu import standing_in

        with standing_in():
            return list(probe(rounds))

    return call


# ---- what runs the parts ------------------------------------------------------------------------------------------


def _torch_probe(rounds: int) -> list[Row]:
    reason = torch_cuda_reason()
    if reason is not None and not DRY_RUN:
        raise BackendError(reason)
    import torch

    from bdexport.architecture import resnet_spec
    from bdexport.models.pair import BlockDropNet
    from bdexport.partition import part_module

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as the backends compute
    block = part_module(BlockDropNet(resnet_spec("resnet110")).eval(), "block_01").to(DEVICE)
    x = torch.randn(1, 16, 32, 32, device=DEVICE)

    def chain() -> None:
        y = x
        for _ in range(BLOCKS):
            y = block(y)

    with torch.inference_mode():
        calls = {"eager": lambda turn: chain()} if DRY_RUN else _torch_calls(chain)
        times = in_turn(calls, rounds, 10)
    titles = {"eager": "eager", "graph": "one graph"}
    return [
        probe_row(f"torch: {BLOCKS} blocks of ResNet-110's first stage, {titles[name]}", values, BLOCKS)
        for name, values in times.items()
    ]


def _torch_calls(chain: Callable[[], None]) -> dict[str, Callable[[int], None]]:
    """The chain on a stream of its own, kernel by kernel and as one CUDA graph."""
    import torch

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            chain()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        chain()

    def eager(turn: int) -> None:
        with torch.cuda.stream(stream):
            chain()
        stream.synchronize()

    def replayed(turn: int) -> None:
        with torch.cuda.stream(stream):
            graph.replay()
        stream.synchronize()

    return {"eager": eager, "graph": replayed}


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
        with bdexport.load(bundle.path, device=DEVICE, executor="chain") as orchestrator:
            session: Any = orchestrator.session
            parts = ["block_01"] * BLOCKS
            x = session.put("block_01", np.zeros((1, *orchestrator.manifest.parts["block_01"].input.shape), np.float32))
            calls: dict[str, Callable[[int], object]] = {
                "one": lambda turn: session.get("block_01", session.run("block_01", x)),
                "plain": lambda turn: session.get("block_01", session.run_path(parts, x)),
            }
            possible, reason = (False, "a dry run") if DRY_RUN else session.can_capture()
            if possible:
                path = session.capture_path(parts, 1)
                calls["graph"] = lambda turn: session.get("block_01", path.run(x))
            times = in_turn(calls, rounds, 10)
    note = "with the copy of the result to the host"
    rows = [
        probe_row(f"{backend}: one block", times["one"], 1, note),
        probe_row(f"{backend}: {BLOCKS} blocks, plain", times["plain"], BLOCKS, note),
    ]
    if "graph" in times:
        return [*rows, probe_row(f"{backend}: {BLOCKS} blocks, one graph", times["graph"], BLOCKS, note)]
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
    parser.add_argument("--only", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS / "probe.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
