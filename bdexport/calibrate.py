"""Ranges of activations for INT8 and FP8, gathered along the paths that the policy takes, and where they are kept.

    a list     which images: JSON, made to be committed (``calibration/NAME.json``)
    a cache    what the network makes of them: ranges by part and tensor, keyed by content (``calibration/*.cache``)

Every part sees the float32 activations that reach it on those images: a block those of the images that keep it, a
shortcut those that drop its block. Ranges are minimum and maximum: with symmetric int8 and one scale per channel of the
weights nothing was lost to outliers, and ONNX Runtime's histograms do not take batches of different sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from bdexport.backends.onnxruntime_common import import_onnxruntime
from bdexport.calibration_list import CalibrationList, list_images, make_list, read_list
from bdexport.config import CalibrationConfig
from bdexport.dataset import needs_folder
from bdexport.errors import CalibrationError, UsageError
from bdexport.files import read_bytes, scratch_folder, sha256_file, write_text
from bdexport.json_text import MalformedError, parse_json, why
from bdexport.limits import MAX_RESULT_BYTES
from bdexport.models.pair import BlockDropNet
from bdexport.partition import part_module, transitions
from bdexport.parts import FULL, HEAD, KEEP_THRESHOLD, POLICY, STEM, block_part, shortcut_part
from bdexport.preprocess import Preprocess
from bdexport.samples import samples_to_json

SCHEMA = "bdexport.scales/2"
METHOD = "minmax"
QUANTISED = ("Conv", "Gemm")  # the operators whose inputs, outputs and weights have scales
QUANTISER_MARK = ("onnx.quant.pre_process", "onnxruntime.quant")
SUFFIX = ".cache"
Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scales:
    """Ranges by part and tensor (lowest, highest); images that each part saw; notes; what they were made from."""

    ranges: dict[str, dict[str, tuple[float, float]]]
    images: dict[str, int]
    notes: tuple[str, ...]
    source: dict[str, Any] = field(default_factory=dict)

    def to_json(self, key: str) -> dict[str, Any]:
        """A JSON object that :func:`_read_cache` reads back."""
        return {
            "schema": SCHEMA,
            "key": key,
            "source": self.source,
            "images": self.images,
            "notes": list(self.notes),
            "ranges": {part: {name: list(ends) for name, ends in found.items()} for part, found in self.ranges.items()},
        }


@dataclass(frozen=True)
class CalibrationRequest:
    """Where scales may come from. ``list_file``: a committed list; ``dataset`` and ``data``: the images themselves.

    ``max_pixels``: image files that have more are refused (None: ``bdexport.limits.MAX_PIXELS``).
    """

    config: CalibrationConfig = field(default_factory=CalibrationConfig)
    dataset: str | None = None
    data: Path | None = None
    list_file: Path | None = None
    max_pixels: int | None = None


def scales_for(
    model: BlockDropNet,
    graphs: Mapping[str, Path],
    preprocess: Preprocess,
    request: CalibrationRequest,
    *,
    class_names: tuple[str, ...] = (),
    progress: Progress | None = None,
    refresh: bool = False,
) -> tuple[Scales, CalibrationList | None]:
    """The scales of a network (``graphs``: its parts in float32): from the cache, or gathered now and kept there.

    Without a list and a data set, the newest cache of this network is taken. The list is returned where one was read or
    made. Raises :class:`CalibrationError`, :class:`DatasetError`, and :class:`UsageError` with the command to run where
    there is nothing to calibrate with.
    """
    network = network_digest(graphs)
    folder = Path(request.config.folder)
    chosen = None if request.list_file is None else read_list(request.list_file)
    if chosen is None and request.dataset is None:
        found = _newest(folder, network)
        if found is None:
            raise UsageError(
                "int8 and fp8 need scales, and none are kept for this network",
                remedy="run `bdexport calibrate CKPT --dataset D --data DIR`, or pass --dataset D --data DIR to build",
            )
        return found, None
    if chosen is None:
        assert request.dataset is not None
        chosen = make_list(request.dataset, request.data, request.config)
    key = scales_key(network, chosen)
    cache = folder / f"{key}{SUFFIX}"
    if cache.is_file() and not refresh:
        kept = _read_cache(cache, key)
        return _with_note(kept, f"calibration: scales from {cache}"), chosen
    # A build's --data may be the folder of its --dataset alone.
    other = request.dataset not in (None, chosen.dataset) and not needs_folder(chosen.dataset)
    data = None if other else request.data
    images = list_images(chosen, data, preprocess, class_names, where=request.list_file, max_pixels=request.max_pixels)
    scales = calibrated(model, graphs, preprocess, images, request.config, progress)
    source = {"dataset": chosen.dataset, "split": chosen.split, "images": len(images), "method": METHOD}
    scales = Scales(
        scales.ranges,
        scales.images,
        scales.notes,
        source | {"list_sha256": chosen.sha256, "network": network, "samples": samples_to_json(images)},
    )
    write_text(cache, json.dumps(scales.to_json(key)) + "\n")
    return _with_note(scales, f"calibration: {len(images)} images of {chosen.dataset}; scales kept in {cache}"), chosen


def network_digest(graphs: Mapping[str, Path]) -> str:
    """SHA-256 over all parts' graphs, weights included: what reaches a block depends on everything before it."""
    lines = [f"{part} {sha256_file(path)}" for part, path in sorted(graphs.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def scales_key(network: str, chosen: CalibrationList) -> str:
    """What a cache is called: the network, then everything else that its ranges depend on."""
    rest = json.dumps([SCHEMA, METHOD, list(QUANTISED), asdict(chosen), import_onnxruntime().__version__])
    return f"{network[:24]}-{hashlib.sha256(rest.encode()).hexdigest()[:24]}"


# ---- gathering --------------------------------------------------------------------------------------------------


def calibrated(
    model: BlockDropNet,
    graphs: Mapping[str, Path],
    preprocess: Preprocess,
    images: NDArray[np.uint8],
    config: CalibrationConfig,
    progress: Progress | None = None,
) -> Scales:
    """Ranges of every part on ``images`` (uint8 (N, H, W, 3), fitted).

    Two activations of all images are held at a time. A block that no image keeps, or a shortcut that none needs, gets
    all images, with a note.
    """
    ranges: dict[str, dict[str, tuple[float, float]]] = {}
    seen: dict[str, int] = {}
    notes: list[str] = []
    for part, x, rows in _inputs(model, preprocess.normalise(images), config.batch):
        if progress is not None:
            progress("calibrate", len(ranges), len(graphs))
        graph = onnx.load(graphs[part])
        seen[part] = len(rows)
        multiplies = any(node.op_type in QUANTISED for node in graph.graph.node)
        if multiplies and not len(rows):
            notes.append(f"calibration: none of the {len(x)} images runs {part}; its scales are from all of them")
            rows = np.arange(len(x))
        ranges[part] = part_ranges(part, graph, x, rows, config.batch, graphs[part]) if multiplies else {}
    if progress is not None:
        progress("calibrate", len(graphs), len(graphs))
    return Scales(ranges, seen, tuple(notes))


def _inputs(model: BlockDropNet, x: Array, batch: int) -> Iterator[tuple[str, Array, NDArray[np.intp]]]:
    """Every part with its input for all images and the rows that run it, in the order of execution."""
    every = np.arange(len(x))
    keep = _run(model, POLICY, x, every, batch) >= KEEP_THRESHOLD
    for part in (POLICY, FULL, STEM):
        yield part, x, every
    x = _run(model, STEM, x, every, batch)
    crossing = frozenset(transitions(model))
    for index in range(keep.shape[1]):
        kept, dropped = np.flatnonzero(keep[:, index]), np.flatnonzero(~keep[:, index])
        block, shortcut = block_part(index), shortcut_part(index)
        yield block, x, kept
        if index in crossing:
            yield shortcut, x, dropped
            y = _run(model, block, x, every[:1], batch)  # one image, for the shape
            after = np.empty((len(x), *y.shape[1:]), np.float32)
            after[dropped] = _run(model, shortcut, x, dropped, batch) if len(dropped) else after[dropped]
        else:
            after = x
        if len(kept):
            after[kept] = _run(model, block, x, kept, batch)
        x = after
    yield HEAD, x, every


@torch.no_grad()
def _run(model: BlockDropNet, part: str, x: Array, rows: NDArray[np.intp], batch: int) -> Array:
    """One part, by torch, on some rows."""
    module = part_module(model, part)
    pieces = (x[rows[start : start + batch]] for start in range(0, len(rows), batch))
    return np.concatenate([module(torch.from_numpy(piece)).numpy() for piece in pieces])


def part_ranges(
    part: str, graph: onnx.ModelProto, x: Array, rows: NDArray[np.intp], batch: int, beside: Path
) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of every input and output of a layer that is quantised, on the given rows of ``x``.

    Scratch stands beside ``beside`` meanwhile.
    """
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._pieces = (x[rows[start : start + batch]] for start in range(0, len(rows), batch))

        def get_next(self) -> dict[str, Array] | None:
            piece = next(self._pieces, None)
            return None if piece is None else {graph.graph.input[0].name: piece}

    with scratch_folder(beside) as folder:
        source = Path(folder, f"{part}.onnx")
        onnx.save_model(graph, source)
        calibrator = create_calibrator(
            source,
            list(QUANTISED),
            augmented_model_path=str(Path(folder, "augmented.onnx")),
            calibrate_method=CalibrationMethod.MinMax,
        )
        calibrator.collect_data(Reader())
        found = calibrator.compute_data()
    ends = {name: tuple(float(np.asarray(end).min()) for end in data.range_value) for name, data in found.items()}
    for name, (low, high) in ends.items():
        if not np.isfinite([low, high]).all():
            raise CalibrationError(f"{part}: {name} is not finite on the calibration images", got=(low, high))
    return {name: (low, high) for name, (low, high) in sorted(ends.items())}


def write_ranges(path: Path, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Ranges in the form in which ONNX Runtime's quantiser reads them."""
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

    arrays = {name: tuple(np.array(end, np.float32) for end in ends) for name, ends in ranges.items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, arrays), path)


# ---- the cache --------------------------------------------------------------------------------------------------


def _read_cache(path: Path, key: str) -> Scales:
    """Raises :class:`CalibrationError` for a file that is not the cache of ``key``."""
    try:
        data = parse_json(read_bytes(path, MAX_RESULT_BYTES))
        if data["schema"] != SCHEMA or data["key"] != key:
            raise MalformedError("another schema or key")
        ranges = {
            part: {name: (float(low), float(high)) for name, (low, high) in found.items()}
            for part, found in data["ranges"].items()
        }
        images = {part: int(count) for part, count in data["images"].items()}
        if any(low > high for found in ranges.values() for low, high in found.values()):
            raise MalformedError("a range that ends before it begins")
        return Scales(ranges, images, tuple(map(str, data["notes"])), dict(data["source"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CalibrationError(
            f"{path}: no scales that can be read ({why(error)})", remedy="delete it and calibrate again"
        ) from error


def _newest(folder: Path, network: str) -> Scales | None:
    caches = sorted(folder.glob(f"{network[:24]}-*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
    if not caches:
        return None
    return _with_note(_read_cache(caches[-1], caches[-1].stem), f"calibration: scales from {caches[-1]}")


def _with_note(scales: Scales, note: str) -> Scales:
    return replace(scales, notes=(*scales.notes, note))
