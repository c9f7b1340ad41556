"""Accuracy of INT8 and FP8 without the hardware that computes in them: SIMULATED by rounding.

    python benchmarks/simulated.py [CKPT] [--dataset cifar10 --data DIR] [--images 2000] [--json FILE]

The graphs are those that ``tensorrt`` and ``tensorrt-rtx`` get: Q/DQ nodes at inputs and weights of what multiplies.
ONNX Runtime runs them on the CPU with every optimisation off: values are rounded to the type and back, and then
multiplied and added in float32. An engine adds in another order, and may keep a layer in another type (its inspector
says which): this is what the rounding costs, not what an engine gives, and it says nothing of speed. Parts and paths
are compared with float32 by the rules of ``bdexport verify``. Prints a table last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bdexport.backends.onnxruntime import open_graphs
from bdexport.backends.onnxruntime_session import OnnxRuntimeSession
from bdexport.build import build_bundle
from bdexport.bundle import Bundle
from bdexport.calibrate import CalibrationRequest, Scales, scales_for
from bdexport.checkpoint import build_model, load_checkpoint
from bdexport.config import CALIBRATED, BuildConfig, CalibrationConfig, FusedConfig
from bdexport.dataset import Dataset, load_dataset
from bdexport.hardware import machine, package_versions
from bdexport.precision import typed_graphs
from bdexport.samples import CALIBRATION
from bdexport.verify import compare

PACKAGES = ("bdexport", "ml_dtypes", "numpy", "onnx", "onnxruntime")
FORM = "tensorrt-rtx"  # whose graphs are run
KINDS = ("dynamic", "full")


def simulated(bundle: Bundle, scales: Scales, precision: str, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """The report of :func:`bdexport.verify.compare` for the graphs in ``precision`` against the bundle's own."""
    graphs = {part: bundle.graph(part) for part in bundle.manifest.parts}
    typed = typed_graphs(graphs, precision, FORM, folder, scales)
    extra = bundle.manifest.extra | {CALIBRATION: scales.source}
    manifest = replace(bundle.manifest, precision=precision, extra=extra)
    with (
        closing(OnnxRuntimeSession(manifest, typed, 1, "simulated by rounding", linked=False)) as candidate,
        closing(open_graphs(bundle)) as reference,
    ):
        return compare(candidate, reference, manifest, reference_name="float32 graphs", judged=dataset)


def row(precision: str, report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report."""
    accuracy = report["accuracy"]
    parts = {entry["part"]: entry["mean_abs"] / entry["tolerance"] for entry in report["parts"]}
    worst = max(parts, key=lambda part: parts[part])
    return {
        "name": f"{precision}, simulated",
        "accuracy": {kind: accuracy[kind]["accuracy"] for kind in KINDS},
        "drop": {kind: accuracy[kind]["drop"] for kind in KINDS},
        "masks_as_float32": 100 * accuracy["masks_equal"],
        "within_tolerance": report["ok"],
        "worst_part": {"part": worst, "share_of_tolerance": parts[worst]},
        "worst_path_share_of_tolerance": max(entry["mean_abs"] / entry["tolerance"] for entry in report["paths"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="zoo:resnet20-digits")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.dataset, arguments.data, arguments.split, limit=arguments.images)
    checkpoint = load_checkpoint(Path(arguments.checkpoint))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = BuildConfig(fused=FusedConfig(measure=False))
        bundle = build_bundle(arguments.checkpoint, folder / "bundle", config=config)
        graphs = {part: bundle.graph(part) for part in bundle.manifest.parts}
        request = CalibrationRequest(CalibrationConfig(folder=str(folder)), arguments.dataset, arguments.data)
        scales, _ = scales_for(
            build_model(checkpoint), graphs, checkpoint.preprocess, request, class_names=checkpoint.class_names
        )
        reports = {kind: simulated(bundle, scales, kind, dataset, folder / kind) for kind in CALIBRATED}
    first = next(iter(reports.values()))["accuracy"]
    float32 = {"name": "fp32", "accuracy": {kind: first[kind]["reference"] for kind in KINDS}}
    data = {
        "schema": "bdexport.benchmark.simulated/1",
        "simulated": "values rounded to the type and back, products and sums in float32 on a CPU; no engine ran",
        "checkpoint": arguments.checkpoint,
        "dataset": {"name": dataset.name, "split": dataset.split},
        "images": len(dataset),
        "calibration": {key: scales.source[key] for key in ("dataset", "split", "images", "method")},
        "machine": machine(),
        "versions": package_versions(PACKAGES),
        "rows": [float32, *(row(kind, report) for kind, report in reports.items())],
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    _print(data)


def _print(data: dict[str, Any]) -> None:
    where = f"{data['checkpoint']}, {data['images']} images of {data['dataset']['name']}"
    table = Table("", title=f"{where}; INT8 and FP8 simulated by rounding")
    for column in (*KINDS, "masks as fp32", "worst part, path (1: tolerance)"):
        table.add_column(column, justify="right")
    for found in data["rows"]:
        cells = [f"{found['accuracy'][kind]:.2f} %" for kind in KINDS]
        if "drop" in found:
            worst = f"{found['worst_part']['part']} {found['worst_part']['share_of_tolerance']:.2f}"
            cells += [
                f"{found['masks_as_float32']:.1f} %",
                f"{worst}, {found['worst_path_share_of_tolerance']:.2f}",
            ]
        table.add_row(found["name"], *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
