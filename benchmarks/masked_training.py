"""How images that drop a block are kept out of it in training: three ways, in turn, in one process.

    python benchmarks/masked_training.py [--arch resnet32] [--batch 256] [--keep 0.5] [--rounds 5] [--json FILE]

``rows moved as NHWC`` is what bdexport does; ``rows moved as NCHW`` indexes the batch as torch shows it; ``dense`` runs
the block on every image and selects the outputs. One round is a forward and backward pass of each with fresh random
masks, bf16 autocast, channels_last. Prints images/s (median over rounds) last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bdexport.models.resnet as resnet
from bdexport.architecture import resnet_spec
from bdexport.hardware import machine, package_versions

RunBlock = Callable[[nn.Module, Tensor, Tensor], Tensor]


def moved_as_nchw(block: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """Gather and scatter along the first dimension of NCHW."""
    assert isinstance(block, resnet.Block)
    kept, out = keep.nonzero().squeeze(1), block.dropped(x)
    return out.index_copy(0, kept, block(x.index_select(0, kept)).to(out.dtype)) if len(kept) else out


def dense(block: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """Everything computed, then selected."""
    assert isinstance(block, resnet.Block)
    out = block.dropped(x)
    return torch.where(keep[:, None, None, None], block(x).to(out.dtype), out)


VARIANTS: dict[str, RunBlock] = {
    "rows moved as NHWC": resnet.run_block,
    "rows moved as NCHW": moved_as_nchw,
    "dense": dense,
}


def seconds_of_step(network: resnet.ResNet, images: Tensor, masks: Tensor, variant: RunBlock) -> float:
    """One forward and backward pass."""
    resnet.run_block = variant
    network.zero_grad(set_to_none=True)
    started = perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = network.forward_masked(images, masks).float().sum()
    loss.backward()
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    spec = resnet_spec(arguments.arch)
    network = resnet.ResNet(spec).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side = spec.image_size
    images = torch.randn(arguments.batch, 3, side, side).to(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(-1, arguments.rounds):
        masks = torch.rand(arguments.batch, spec.num_blocks) < arguments.keep
        for name, variant in VARIANTS.items():
            seconds = seconds_of_step(network, images, masks, variant)
            if turn >= 0:
                times[name].append(seconds)
    rates = {name: arguments.batch / float(np.median(values)) for name, values in times.items()}
    data = {
        "schema": "bdexport.benchmark.masked_training/1",
        "arch": arguments.arch,
        "batch": arguments.batch,
        "keep": arguments.keep,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "images_per_s": rates,
        "machine": machine(),
        "versions": package_versions(("bdexport", "torch")),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    table = Table("way", "images/s", title=f"{arguments.arch}, batch {arguments.batch}, {arguments.keep:.0%} kept")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
