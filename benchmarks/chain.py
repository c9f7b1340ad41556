"""What running block by block costs: the chain with a given number of blocks kept against the full network's engine.

    python benchmarks/chain.py [--arch resnet56] [--threads 1 2] [--batch 1] [--rounds 300] [--json FILE]

The network has random weights (time does not depend on them) and its masks are random, so the policy's engine runs but
its choice is overridden. Everything is measured in one process, in turn, warm-up excluded: per turn, the full network
once and the chain once for each number of kept blocks. ``ratio`` is chain / full of the medians; ``ideal`` is the
share of the full network's FLOPs that the path runs. Also: time to load the bundle, and memory. Prints a table last.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import bdexport
from bdexport.bench.results import path_share
from bdexport.hardware import machine, package_versions

PACKAGES = ("bdexport", "numpy", "onnxruntime", "torch")


def build(arch: str, folder: Path) -> Path:
    """A bundle of the architecture with random weights."""
    import torch

    from bdexport.architecture import policy_spec, resnet_spec
    from bdexport.build import build_bundle
    from bdexport.checkpoint import Checkpoint, save_checkpoint
    from bdexport.models.pair import BlockDropNet
    from bdexport.preprocess import Preprocess

    torch.manual_seed(0)
    spec = resnet_spec(arch)
    model = BlockDropNet(spec).eval()
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    names = tuple(str(index) for index in range(spec.num_classes))
    size = (spec.image_size, spec.image_size)
    path = folder / f"{arch}.safetensors"
    save_checkpoint(path, Checkpoint(spec, policy_spec(spec), Preprocess(size), names, state))
    return build_bundle(path, folder / arch).path


def measure(bundle: Path, threads: int, batch: int, rounds: int) -> dict[str, Any]:
    """Times in ms of the full engine and of the chain for 100, 75, 50 and 30 % of the blocks, in turn."""
    started = perf_counter()
    with bdexport.load(bundle, threads=threads) as orchestrator:
        load_ms = (perf_counter() - started) * 1e3
        num_blocks = orchestrator.manifest.num_blocks
        rng = np.random.default_rng(0)
        images = orchestrator.manifest.preprocess.normalise(
            rng.integers(0, 256, (batch, *orchestrator.manifest.preprocess.size, 3), dtype=np.uint8)
        )
        kept = sorted({round(share * num_blocks) for share in (1.0, 0.75, 0.5, 0.3)}, reverse=True)
        masks = {count: _mask(rng, num_blocks, count, batch) for count in kept}
        times: dict[Any, list[float]] = {"full": [], **{count: [] for count in kept}}
        gc.disable()
        for turn in range(-20, rounds):
            full = orchestrator.full(images).timings["network"]
            chain = {count: orchestrator(images, masks=mask).timings["network"] for count, mask in masks.items()}
            if turn >= 0:
                times["full"].append(full)
                for count, value in chain.items():
                    times[count].append(value)
        gc.enable()
        shares = {count: float(path_share(mask, orchestrator.manifest).mean()) for count, mask in masks.items()}
    full_ms = _summary(times["full"])
    rows = []
    for count in kept:
        chain_ms = _summary(times[count])
        ratio = chain_ms["p50"] / full_ms["p50"]
        rows.append(
            {"kept": count, "ideal": shares[count], "ratio": ratio, "ratio_of_minima": chain_ms["min"] / full_ms["min"]}
            | {"chain_ms": chain_ms}
        )
    return {"threads": threads, "batch": batch, "blocks": num_blocks, "load_ms": load_ms, "full_ms": full_ms} | {
        "chain": rows
    }


def _mask(rng: np.random.Generator, num_blocks: int, count: int, batch: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The same random mask for every image: no regrouping in this measurement."""
    mask = np.zeros(num_blocks, dtype=bool)
    mask[rng.permutation(num_blocks)[:count]] = True
    return np.repeat(mask[None], batch, axis=0)


def _summary(values: list[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90), "p99": float(p99)} | {
        "min": float(min(values))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(arguments.arch, Path(folder))
        results = [measure(bundle, threads, arguments.batch, arguments.rounds) for threads in arguments.threads]
    data = {
        "schema": "bdexport.benchmark.chain/1",
        "arch": arguments.arch,
        "rounds": arguments.rounds,
        "machine": machine(),
        "versions": package_versions(PACKAGES),
        "results": results,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    table = Table(title=f"{arguments.arch}, batch {arguments.batch}, {arguments.rounds} rounds, ms are medians")
    for column in ("threads", "load ms", "full ms", "kept", "chain ms", "ratio", "ratio of minima", "ideal"):
        table.add_column(column, justify="right")
    for result in results:
        for row in result["chain"]:
            table.add_row(
                *(str(result["threads"]), f"{result['load_ms']:.0f}", f"{result['full_ms']['p50']:.3f}"),
                *(f"{row['kept']}/{result['blocks']}", f"{row['chain_ms']['p50']:.3f}", f"{row['ratio']:.2f}"),
                *(f"{row['ratio_of_minima']:.2f}", f"{row['ideal']:.2f}"),
            )
    Console().print(table)


if __name__ == "__main__":
    main()
