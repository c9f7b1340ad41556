"""Accuracy and latency of every backend and precision, on the same images, in turn.

    python benchmarks/precisions.py [CKPT] [--dataset cifar10 --data DIR] [--images 1000] [--rounds 300] [--json FILE]

One bundle each, built in a temporary folder; int8 is calibrated on --calibration (a list) or on training images.
Then, batch 1 and one thread, every bundle takes turns: per turn, the full network once and dynamic inference once
each, on the same image. ``path`` is dynamic without the policy. What a backend cannot do here is a line with the
reason. Accuracy is that of all images, dynamic and full; ``masks``: for how many images the policy decides as in the
first row. Prints a table last.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import bdexport
from bdexport.build import build_bundle
from bdexport.calibrate import CalibrationRequest
from bdexport.config import BuildConfig, CalibrationConfig
from bdexport.dataset import Dataset, load_dataset
from bdexport.errors import BdexportError
from bdexport.hardware import machine, package_versions
from bdexport.precision import PRECISIONS

PACKAGES = ("bdexport", "numpy", "onnx", "onnxruntime", "openvino", "torch")
SIDES = ("full", "dynamic", "path")


def build(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Bundles by "backend precision", and why the others are not there."""
    config = replace(CalibrationConfig(), folder=str(folder / "scales"))
    request = CalibrationRequest(config, arguments.dataset, arguments.data, arguments.calibration)
    built, missing = {}, {}
    for backend in arguments.backends:
        for precision in PRECISIONS:
            name = f"{backend} {precision}"
            try:
                out = folder / name.replace(" ", "-")
                chosen = BuildConfig(backend=backend, precision=precision)
                built[name] = build_bundle(arguments.checkpoint, out, config=chosen, calibration=request).path
            except BdexportError as error:
                missing[name] = str(error)
    return built, missing


def measure(bundles: dict[str, Path], dataset: Dataset, rounds: int) -> list[dict[str, Any]]:
    """One row per bundle, in order."""
    with ExitStack() as stack:
        loaded = {name: stack.enter_context(bdexport.load(path, threads=1)) for name, path in bundles.items()}
        first = next(iter(loaded.values()))
        images = dataset.arrays(first.manifest.preprocess)
        results = {name: [(one(images[i : i + 50]), one.full(images[i : i + 50])) for i in range(0, len(images), 50)]
                   for name, one in loaded.items()}  # fmt: skip
        times: dict[str, dict[str, list[float]]] = {name: {side: [] for side in SIDES} for name in loaded}
        names = list(loaded)
        gc.disable()
        for turn in range(-20, rounds):
            image = images[turn % len(images)][None]
            for name in names if turn % 2 else names[::-1]:
                full, dynamic = loaded[name].full(image).timings, loaded[name](image).timings
                if turn >= 0:
                    times[name]["full"].append(full["network"])
                    times[name]["dynamic"].append(dynamic["policy"] + dynamic["network"])
                    times[name]["path"].append(dynamic["network"])
        gc.enable()
        notes = {name: list(one.session.notes) for name, one in loaded.items()}
    masks = {name: np.concatenate([pair[0].masks for pair in found]) for name, found in results.items()}
    rows = []
    for name, found in results.items():
        dynamic, full = (np.concatenate([pair[side].classes for pair in found]) for side in (0, 1))
        rows.append(
            {
                "name": name,
                "accuracy": {"dynamic": _percent(dynamic == dataset.labels), "full": _percent(full == dataset.labels)},
                "blocks_used": float(masks[name].sum(axis=1).mean()),
                "masks_as_first": _percent((masks[name] == masks[names[0]]).all(axis=1)),
                "latency_ms": {side: _summary(values) for side, values in times[name].items()},
                "notes": notes[name],
            }
        )
    return rows


def _percent(values: Any) -> float:
    return float(100 * values.mean())


def _summary(values: list[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90), "p99": float(p99)} | {
        "min": float(min(values))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="zoo:resnet20-digits")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calibration", type=Path, help="a list that `bdexport calibrate` wrote")
    parser.add_argument("--backends", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.dataset, arguments.data, arguments.split, limit=arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        bundles, missing = build(arguments, Path(folder))
        rows = measure(bundles, dataset, arguments.rounds)
    data = {
        "schema": "bdexport.benchmark.precisions/1",
        "checkpoint": str(arguments.checkpoint),
        "dataset": {"name": dataset.name, "split": dataset.split},
        "images": len(dataset),
        "rounds": arguments.rounds,
        "batch": 1,
        "threads": 1,
        "machine": machine(),
        "versions": package_versions(PACKAGES),
        "rows": rows,
        "missing": missing,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    _print(data)


def _print(data: dict[str, Any]) -> None:
    where = f"{data['checkpoint']}, {data['images']} images of {data['dataset']['name']}"
    table = Table("", title=f"{where}; {data['rounds']} turns, batch 1, one thread; ms: p50 (fastest)")
    for column in ("dynamic", "full", "masks", *(f"{side} ms" for side in SIDES)):
        table.add_column(column, justify="right")
    for row in data["rows"]:
        times = [f"{row['latency_ms'][side]['p50']:.3f} ({row['latency_ms'][side]['min']:.3f})" for side in SIDES]
        accuracies = [f"{row['accuracy'][side]:.2f} %" for side in ("dynamic", "full")]
        table.add_row(row["name"], *accuracies, f"{row['masks_as_first']:.1f} %", *times)
    console = Console()
    for name, reason in data["missing"].items():
        console.print(f"{name}: {reason}", soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
