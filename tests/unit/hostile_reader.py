"""Reads files one after the other, each with no more memory than ``bdexport/limits.py`` allows for its kind.

``python hostile_reader.py FOLDER``: MODEL.th, a small checkpoint, is read first, so that everything is imported; then
every ``KIND/NAME``. One JSON list a line on the standard output: kind, name, what became of it, seconds.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bdexport import limits
from bdexport.calibration_list import read_list
from bdexport.checkpoint import build_model, load_checkpoint
from bdexport.checkpoint.against import check_against
from bdexport.dataset.pickles import read_pickle
from bdexport.errors import BdexportError
from bdexport.limits import MIB, Cost
from bdexport.preprocess import read_image

SLACK = 64 * MIB  # what the allocator takes in advance
COSTS = {
    "torch": limits.TORCH_COST,
    "safetensors": limits.SAFETENSORS_COST,
    "reference": limits.REFERENCE_COST,
    "cifar": limits.CIFAR_COST,
    "image": limits.IMAGE_COST,
    "list": limits.LIST_COST,
}


def outcome(read: Callable[[Path], Any], path: Path, cost: Cost) -> str:
    """What reading gives, with so much address space beyond what the process has now."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = taken + cost.memory + cost.times * path.stat().st_size + SLACK
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    try:
        read(path)
    except BdexportError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "accepted"


def main(folder: Path) -> None:
    """Read them all."""
    ckpt = load_checkpoint(folder / "MODEL.th")
    model = build_model(ckpt, with_policy=False)
    readers: dict[str, Callable[[Path], Any]] = {
        "torch": load_checkpoint,
        "safetensors": load_checkpoint,
        "cifar": read_pickle,
        "reference": lambda path: check_against(model, ckpt, path),
        "image": lambda path: ckpt.preprocess.fit_image(read_image(path)),
        "list": read_list,
    }
    for path in sorted(folder.glob("*/*")):
        kind = path.parent.name
        began = time.perf_counter()
        said = outcome(readers[kind], path, COSTS[kind])
        print(json.dumps([kind, path.name, said, time.perf_counter() - began]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
