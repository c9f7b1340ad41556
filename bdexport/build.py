"""Checkpoint -> parts -> engines -> bundle. All of it happens in a folder beside the target, which takes the target's
name only when everything is built and verified.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import torch

from bdexport import __version__
from bdexport.backends import backend_class, get_builder
from bdexport.backends.base import Backend, BuildOptions, RebuildingBackend
from bdexport.build_engines import build_engines
from bdexport.bundle import Bundle, Manifest, PartEntry, file_entry, open_bundle, write_manifest
from bdexport.calibrate import CalibrationRequest, Scales, scales_for
from bdexport.checkpoint import Checkpoint, build_model, load_checkpoint, loading_record, named_by
from bdexport.checkpoint.against import check_against as compare_logits
from bdexport.checkpoint.reading import RUN_FILE, checkpoint_file
from bdexport.config import CALIBRATED, BuildConfig, VerifyConfig
from bdexport.dataset import Dataset
from bdexport.engine_cache import EngineCache
from bdexport.errors import UsageError
from bdexport.export import Progress, Specs, export_parts
from bdexport.files import cache_folder, check_new_folder, making_folder, scratch_folder, sha256_file, shown
from bdexport.fixed_mask import KEY, chosen_mask, model_with_mask, with_mask
from bdexport.fusing import Fusing, check_fusing, check_size, check_static
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.models.policy_size import cost_text as share_text
from bdexport.partition import part_specs, transitions
from bdexport.policy_cost import cost_text, policy_cost
from bdexport.precision import check_offered, typed_graphs
from bdexport.samples import CALIBRATION
from bdexport.signature import SigningKey
from bdexport.verify import require, verify_against_model
from bdexport.verify_accuracy import accuracy_text, require_accuracy
from bdexport.zoo import zoo_name

GRAPHS, ENGINES, SOURCES = "graphs", "engines", "sources"  # folders inside a bundle
DEFAULT_PARENT = Path("engines")  # where bundles go when no place is named
STATISTICS = "policy_statistics"  # of a checkpoint's training record; the manifest keeps it apart


@dataclass(frozen=True)
class BuiltBundle(Bundle):
    """A bundle fresh from the build.

    ``engines`` says for each part "built", "reused" (from the cache) or "rebuilt" (the cache's copy was damaged);
    ``notes`` are choices and troubles on the way, each with its reason.
    """

    engines: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quantisation: tuple[dict[str, Any], ...] = ()  # rows of the table, see bdexport.quantise
    fusing: dict[str, Any] | None = None  # "seconds" that fusing takes, "bytes_before" and "bytes_after"
    loading: dict[str, Any] = field(default_factory=dict)  # see bdexport.checkpoint.loading_record
    checked_against: dict[str, Any] | None = None  # see bdexport.checkpoint.against
    policy_cost: dict[str, Any] = field(default_factory=dict)  # see bdexport.policy_cost

    def count(self, outcome: str) -> int:
        """How many engines were "built", "reused" or "rebuilt"."""
        return Counter(self.engines.values())[outcome]


def build_bundle(
    checkpoint_path: str | Path,
    out: str | Path | None = None,
    *,
    config: BuildConfig | None = None,
    loading: Mapping[str, Any] | None = None,
    loaded: Callable[[Checkpoint], None] | None = None,
    check_against: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    cache_dir: str | Path | None = None,
    calibration: CalibrationRequest | None = None,
    counted: Dataset | None = None,
    judged: Dataset | None = None,
    verify: VerifyConfig | None = None,
    mask: str | None = None,
    sign: str | Path | None = None,
    note: Callable[[str], None] | None = None,
) -> BuiltBundle:
    """Build the bundle of a checkpoint at ``out`` (default: ``engines/<name>``) and verify it against torch.

    ``loading``: arguments of :func:`load_checkpoint`, e.g. ``{"shortcut": "avgpool"}``; ``loaded`` is called with what
    it gave. Classes without names get those of the images that are named below. ``check_against``: a reference that
    the undropped network's logits must meet (:mod:`bdexport.checkpoint.against`) before anything is built.
    ``progress(what, done, total)`` is called along the way. ``cache_dir``: the engine cache, default as
    :func:`bdexport.files.default_cache_folder`. ``calibration``: where int8 and fp8 take scales from. ``counted``:
    images on which masks are counted and executors measured, best a validation split; None: the masks that the
    checkpoint's policy statistics count, and random images. ``judged``: images on which accuracy is held against
    torch's. ``mask``: one mask (K characters, 0 or 1) for every image instead of a policy, which the checkpoint need
    not have; None: a network that was finetuned under one mask gets that one.
    ``sign``: the file of a minisign secret key without a password, to sign the bundle with.
    ``note`` is told beforehand what can be gained at most with such a policy.

    Raises UsageError, CheckpointError, CalibrationError, DatasetError, ExportError, BuildError, VerificationError or
    OutputError; after them, as after Ctrl-C, nothing is left and an old bundle is as it was.
    """
    config = config or BuildConfig()
    backend = checked_backend(config)
    signing = None if sign is None else SigningKey(sign)
    path = Path(checkpoint_path)
    if out is not None:
        check_new_folder(Path(out), overwrite)
    if progress is not None:
        progress("load", 0, 1)
    checkpoint = named_by(load_checkpoint(path, **loading or {}), counted or judged)
    if loaded is not None:
        loaded(checkpoint)
    fixed = chosen_mask(mask, checkpoint)
    if fixed is None:
        model = build_model(checkpoint)
    else:
        check_static(config.fused)
        model, checkpoint = model_with_mask(checkpoint, fixed), with_mask(checkpoint, fixed)
    place = default_bundle_path(path)
    place = Path(out) if out is not None else place if mask is None else place.with_name(f"{place.name}-{mask}")
    check_new_folder(place, overwrite)
    checked = None if check_against is None else compare_logits(model, checkpoint, Path(check_against))
    if progress is not None:
        progress("load", 1, 1)
    cache, notes = _engine_cache(cache_dir)
    if note is not None and fixed is None:
        counted_blocks = (checkpoint.training.get(STATISTICS) or {}).get("blocks_used") or {}
        table = count_flops(model, checkpoint.preprocess.size)
        note(share_text(table, counted_blocks.get("mean")))
    built = bundle_from_model(
        model,
        checkpoint,
        place,
        backend,
        config=config,
        checkpoint_sha256=sha256_file(checkpoint_file(path)),
        overwrite=overwrite,
        progress=progress,
        cache=cache,
        calibration=calibration,
        counted=counted,
        judged=judged,
        verify=verify,
        fixed=fixed,
        signing=signing,
    )
    notes += built.notes
    return replace(built, notes=tuple(notes), loading=loading_record(checkpoint), checked_against=checked)


def _engine_cache(folder: str | Path | None) -> tuple[EngineCache | None, list[str]]:
    """The cache in ``folder`` or in the default one; None, with a note that says why, where there is no such folder."""
    place, why = cache_folder(folder)
    if place is None:
        return None, [f"engine cache: {why}; engines are not kept for a later build"]
    return EngineCache(place), []


def bundle_from_model(
    model: BlockDropNet,
    checkpoint: Checkpoint,
    out: Path,
    backend: Backend,
    *,
    config: BuildConfig,
    checkpoint_sha256: str,
    overwrite: bool = False,
    progress: Progress | None = None,
    cache: EngineCache | None = None,
    calibration: CalibrationRequest | None = None,
    counted: Dataset | None = None,
    judged: Dataset | None = None,
    verify: VerifyConfig | None = None,
    fixed: str | None = None,
    signing: SigningKey | None = None,
) -> BuiltBundle:
    """:func:`build_bundle` for a model in memory and any backend object; ``checkpoint.state`` is not read."""
    report: Progress = progress or (lambda _what, _done, _total: None)
    options = backend.resolved(_build_options(config))
    with making_folder(out, overwrite) as staging, scratch_folder(staging / "typed") as typed_folder:
        specs = part_specs(model, checkpoint.preprocess)
        graphs = export_parts(model, checkpoint.preprocess, staging / GRAPHS, specs=specs, progress=report)
        scales = _scales(graphs, model, checkpoint, config, calibration, report)
        rebuilds = isinstance(backend, RebuildingBackend)
        typed_place = staging / SOURCES if rebuilds else typed_folder
        typed = typed_graphs(graphs, config.precision, backend.name, typed_place, scales)
        engines, outcomes, notes = build_engines(
            typed, staging / ENGINES, backend, options, config.jobs, model, cache, report
        )
        notes += [] if scales is None else scales.notes
        sources = {part: graph for part, graph in typed.items() if rebuilds and graph != graphs[part]}
        parts = _part_entries(staging, graphs, engines, sources, specs, model, checkpoint)
        manifest = _manifest(out, model, checkpoint, backend, options, parts, checkpoint_sha256)
        check_size(manifest, config.fused.max_bundle_mb)
        if fixed is not None:
            manifest = replace(manifest, extra=manifest.extra | {KEY: fixed})
            notes.append(f"every image runs the mask {fixed}: no policy network decides")
        if scales is not None:
            manifest = replace(
                manifest, extra=manifest.extra | {CALIBRATION: scales.source | {"images_by_part": scales.images}}
            )
        fusing = Fusing(Bundle(staging, manifest), backend, config.fused, counted, report)
        manifest = fusing.with_mapping(fusing.with_paths())
        # The manifest is written last: a folder that a killed build leaves behind is no bundle.
        verification = _verified(Bundle(staging, manifest), model, backend, options, notes, report, judged, verify)
        manifest = replace(fusing.with_executor(manifest), verification=verification)
        write_manifest(staging, manifest, signing)
        notes += fusing.notes
        cost = policy_cost(manifest, fusing.times)
        if fixed is None and fusing.times is not None:
            notes.append(cost_text(cost))
    opened = open_bundle(out)
    return BuiltBundle(
        opened.path,
        opened.manifest,
        engines=outcomes,
        notes=tuple(notes),
        quantisation=tuple(fusing.table),
        fusing=fusing.costs,
        policy_cost=cost,
    )


def checked_backend(config: BuildConfig) -> Backend:
    """The configured backend. Raises :class:`UsageError` for a name, precision, batch or job count that cannot be."""
    check_offered(config.backend, config.precision, backend_class(config.backend).precisions)
    for name, value in (("--max-batch", config.max_batch), ("--jobs", config.jobs)):
        if value is not None and value < 1:
            raise UsageError(name, got=value, expected="at least 1")
    backend = get_builder(config.backend)
    backend.resolved(_build_options(config))
    check_fusing(config.fused, backend)
    return backend


def _build_options(config: BuildConfig) -> BuildOptions:
    return BuildOptions(config.precision, config.max_batch, config.tensorrt)


def default_bundle_path(checkpoint_path: Path) -> Path:
    """``engines/<name>``: the name in the zoo, the run folder's, or the checkpoint file's without its suffix.

    A link has its own name, not that of what it points to, which in a cache is a hash; in Hugging Face's cache a
    folder called by its commit is called by its repository.
    """
    name = zoo_name(checkpoint_path)
    if name is not None:
        return DEFAULT_PARENT / name
    path = Path(os.path.abspath(checkpoint_path))
    is_folder = path.is_dir()
    if path.name == RUN_FILE:
        path, is_folder = path.parent, True
    if is_folder and path.parent.name == "snapshots":
        path = Path(path.parent.parent.name.rpartition("--")[2] or path.name)
    return DEFAULT_PARENT / (path.name if is_folder else path.stem or path.name)


def _scales(
    graphs: Mapping[str, Path],
    model: BlockDropNet,
    checkpoint: Checkpoint,
    config: BuildConfig,
    calibration: CalibrationRequest | None,
    report: Progress,
) -> Scales | None:
    """What a calibrated precision needs, None for every other."""
    if config.precision not in CALIBRATED:
        return None
    request = calibration or CalibrationRequest()
    names = checkpoint.class_names
    return scales_for(model, graphs, checkpoint.preprocess, request, class_names=names, progress=report)[0]


def _part_entries(
    staging: Path,
    graphs: Mapping[str, Path],
    engines: Mapping[str, Path],
    sources: Mapping[str, Path],
    specs: Specs,
    model: BlockDropNet,
    checkpoint: Checkpoint,
) -> dict[str, PartEntry]:
    flops = count_flops(model, checkpoint.preprocess.size).parts()
    return {
        part: PartEntry(
            part,
            file_entry(staging, graphs[part]),
            file_entry(staging, engines[part]),
            *specs[part],
            flops[part],
            file_entry(staging, sources[part]) if part in sources else None,
        )
        for part in graphs
    }


def _manifest(
    out: Path,
    model: BlockDropNet,
    checkpoint: Checkpoint,
    backend: Backend,
    options: BuildOptions,
    parts: dict[str, PartEntry],
    checkpoint_sha256: str,
) -> Manifest:
    network = model.network.spec
    training = {key: value for key, value in checkpoint.training.items() if key != STATISTICS}
    return Manifest(
        name=shown(Path(out.absolute().name)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        architecture=network.name,
        network=network.to_json(),
        num_blocks=network.num_blocks,
        transitions=transitions(model),
        dropped_transition=network.dropped_transition,
        preprocess=checkpoint.preprocess,
        class_names=checkpoint.class_names,
        backend=backend.name,
        precision=options.precision,
        max_batch=options.max_batch,
        parts=parts,
        versions=_tool_versions() | dict(backend.versions()),
        fingerprint=backend.fingerprint(),
        compute_capability=", ".join(options.tensorrt.compute_capabilities) or None,
        training=training,
        extra={"loading": list(checkpoint.notes)} if checkpoint.notes else {},
        policy_statistics=checkpoint.training.get(STATISTICS) or {},
        checkpoint={"sha256": checkpoint_sha256, "form": checkpoint.form},
    )


def _verified(
    bundle: Bundle,
    model: BlockDropNet,
    backend: Backend,
    options: BuildOptions,
    notes: list[str],
    report: Progress,
    judged: Dataset | None,
    config: VerifyConfig | None,
) -> dict[str, Any] | None:
    """The report of comparing engines with torch, which holds; None, with a note, where there is nothing to compare."""
    if not backend.computes:
        notes.append(f"not verified: backend {backend.name} computes nothing")
        return None
    here = backend.can_run(options)
    if not here.ok:
        notes.append(f"not verified: the engines cannot run here ({here.reason}); run `bdexport verify` where they can")
        return None
    result = verify_against_model(bundle, model, config=config, progress=report, judged=judged)
    require(result)
    if judged is not None:
        notes.append(accuracy_text(result["accuracy"]))
        require_accuracy(result["accuracy"], f"{backend.name} {bundle.manifest.precision}")
    return result


def _tool_versions() -> dict[str, str]:
    return {
        "bdexport": __version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
