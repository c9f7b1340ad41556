"""What is named on the command line: run folders, checkpoints, and JSON results. Reads them; measures nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdexport.bundle import MANIFEST
from bdexport.errors import ReportError, UsageError
from bdexport.files import shown as shown_path
from bdexport.json_text import MalformedError, shown, why
from bdexport.report.benchmarks import BENCHMARK_SCHEMA, Benchmark, read_benchmark
from bdexport.report.curves import read_metrics
from bdexport.report.fields import figure, object_of, read_bytes, text
from bdexport.report.points import (
    BLOCKDROP,
    EVALUATE_SCHEMA,
    FIXED_MASKS,
    POINTS_SCHEMA,
    Point,
    method_key,
    points_from_evaluation,
    points_from_file,
)
from bdexport.report.tables import Latency

BENCH_SCHEMA, QUICKSTART_SCHEMA = "bdexport.bench/1", "bdexport.quickstart/1"
# As bdexport.train.state names them, which needs torch; results alone must be readable without it.
RUN_FILE, METRICS_FILE, MODEL_FILE = "run.json", "metrics.jsonl", "model.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """What ``bdexport train`` leaves: settings and epochs. ``finished``: it has a model."""

    description: dict[str, Any]
    rows: list[dict[str, Any]]
    finished: bool


@dataclass(frozen=True)
class Trained:
    """A run folder or a checkpoint file. ``name`` is unique within a report."""

    name: str
    path: Path
    run: RunFolder | None = None

    @property
    def has_model(self) -> bool:
        """Whether there is a checkpoint to load."""
        return self.run is None or self.run.finished


@dataclass
class Sources:
    """Everything that was named, sorted by what it is; ``skipped`` says what was not used, and why."""

    trained: list[Trained] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


NAME_SOMETHING = "name RUN folders, checkpoints or JSON results of 'bdexport evaluate' or 'bdexport bench'"


def read_sources(paths: Sequence[Path]) -> Sources:
    """Sort and read ``paths``. Raises UsageError (nothing there, a bundle), ReportError (a damaged file)."""
    if not paths:
        raise UsageError("nothing to report on", remedy=NAME_SOMETHING)
    found = Sources()
    names = unique_names([path for path in paths if path.suffix != ".json"])
    for path in dict.fromkeys(paths):
        if path.suffix == ".json":
            _read_result(path, found)
        elif path.is_dir():
            found.trained.append(Trained(names[path], path, _read_run(path)))
        else:
            found.trained.append(Trained(names[path], path))
    if not (found.trained or found.points or found.latencies or found.benchmarks):
        empty = "; ".join(f"{shown_path(path)}: no result in it" for path in paths)
        raise UsageError("nothing to report on", got="; ".join(found.skipped) or empty, remedy=NAME_SOMETHING)
    return found


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Short names: a run's folder or a file's name, with as many folders before it as it takes to tell them apart."""
    plain = {path: (path.parent if path.name == MODEL_FILE else path) for path in paths}
    depth = dict.fromkeys(plain, 1)
    for _ in range(max((len(path.parts) for path in plain.values()), default=0)):
        names = {path: "/".join(plain[path].parts[-depth[path] :]) for path in plain}
        repeated = {name for name, count in Counter(names.values()).items() if count > 1}
        if not repeated:
            break
        for path, name in names.items():
            depth[path] += name in repeated
    return {path: shown_path(Path("/".join(plain[path].parts[-depth[path] :]) or path)) for path in plain}


def trained_as(settings: dict[str, Any]) -> tuple[str, bool | None]:
    """(method, finetuned) from the settings that a run or a checkpoint's training record holds.

    A run with method ``fixed`` is called after its mask: ``distribute-k``, .., ``searched``, or ``fixed`` for one
    that was given as a text.
    """
    method = method_key(str(settings.get("method") or BLOCKDROP))
    fixed = settings.get("fixed")
    if method == "fixed" and isinstance(fixed, dict):
        mask = str(fixed.get("mask"))
        method = "searched" if mask == "search" else mask if mask in FIXED_MASKS else "fixed"
    finetune = settings.get("finetune")
    epochs = finetune.get("epochs") if isinstance(finetune, dict) else None
    return method, epochs > 0 if isinstance(epochs, int) else None


def trained_record(training: dict[str, Any]) -> dict[str, Any]:
    """``{"trained": {"method", "finetuned", "mask"}}`` for a result of a checkpoint; empty where nothing is known.

    ``mask``: the title of the fixed mask that it was finetuned under, as ``evaluate`` calls it; None for a policy.
    """
    settings = training.get("settings")
    if not isinstance(settings, dict):
        return {}
    method, finetuned = trained_as(settings)
    return {"trained": {"method": method, "finetuned": finetuned, "mask": mask_title(training)}}


def mask_title(training: dict[str, Any]) -> str | None:
    """``distribute-k 8``, or the mask as a text: what a network of method ``fixed`` was finetuned under."""
    fixed = training.get("fixed_mask")
    if not isinstance(fixed, dict):
        return None
    mask = str(fixed.get("mask"))
    return f"{mask} {fixed.get('kept')}" if mask in FIXED_MASKS else mask


def _read_run(path: Path) -> RunFolder | None:
    """The run in a folder; None for a folder that holds only a model."""
    if (path / MANIFEST).is_file():
        raise UsageError(f"{path}: is a bundle", expected="a RUN folder", remedy="'bdexport bench' measures bundles")
    finished = (path / MODEL_FILE).is_file()
    if not (path / RUN_FILE).is_file():
        if finished:
            return None
        raise UsageError(f"{path}: no run", got=f"no {RUN_FILE} in it", expected="a folder that 'bdexport train' made")
    metrics = path / METRICS_FILE
    return RunFolder(_json_object(path / RUN_FILE), read_metrics(metrics) if metrics.is_file() else [], finished)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return object_of(read_bytes(path))
    except MalformedError as error:
        raise ReportError(f"{path}: not JSON that a report reads ({error})", remedy="write it again") from error


def _read_result(path: Path, found: Sources) -> None:
    data, where = _json_object(path), shown_path(path)
    schema = data.get("schema")
    if schema == EVALUATE_SCHEMA:
        found.points += points_from_evaluation(data, where)
    elif schema == POINTS_SCHEMA:
        found.points += points_from_file(data, where)
    elif schema == BENCH_SCHEMA:
        _read_bench(data, where, found)
    elif schema == QUICKSTART_SCHEMA and isinstance(data.get("bench"), dict):
        _read_bench(data["bench"], where, found)
    elif schema == BENCHMARK_SCHEMA:
        benchmark = read_benchmark(data, where)
        if isinstance(benchmark, str):
            found.skipped.append(benchmark)
        elif benchmark.table is not None:
            found.benchmarks.append(benchmark)
    elif isinstance(schema, str) and schema.startswith("bdexport."):
        found.skipped.append(f"{where}: {schema} holds nothing for a report on runs")
    else:
        raise ReportError(
            f"{where}: schema",
            got=shown(schema),
            expected=f"{EVALUATE_SCHEMA}, {POINTS_SCHEMA} or {BENCH_SCHEMA}",
            remedy="name a file that 'bdexport evaluate --json' or 'bdexport bench --json' wrote",
        )


def _read_bench(data: dict[str, Any], where: str, found: Sources) -> None:
    """The latency of one image, for Table 2; accuracy comes from ``evaluate``, which sees the whole split."""
    try:
        if (batch := figure(data, "batch", low=1)) != 1:
            found.skipped.append(f"{where}: measured at batch {batch:g}; Table 2 is about one image at a time")
            return
        threads = f", threads {figure(data, 'threads'):g}" if data.get("threads") is not None else ""
        place = f"{text(data, 'backend')} {text(data, 'precision')} on {text(data, 'device')}"
        found.latencies.append(
            Latency(
                label=Path(text(data, "bundle")).name,
                architecture=text(data, "architecture"),
                dataset=text(data, "dataset.name"),
                where=f"{place}{threads} ({text(data, 'machine.cpu')})",
                full_ms=figure(data, "full.latency_ms.mean", low=1e-6),
                dynamic_ms=figure(data, "dynamic.latency_ms.mean", low=1e-6),
            )
        )
    except MalformedError as error:
        raise ReportError(
            f"{where}: not a complete result of 'bdexport bench --json' ({why(error)})",
            remedy="write it again",
        ) from error
