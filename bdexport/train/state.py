"""What a run keeps on disk: resolved settings, the state to resume from, metrics, and the chosen model.

    RUN/run.json           settings, network, data: what the run is; a resumed run must agree with it
    RUN/state.pt           weights, optimisers, teacher, best model so far: written after every epoch, atomically
    RUN/metrics.jsonl      one JSON object per epoch
    RUN/tensorboard/       the same for TensorBoard, where it is installed
    RUN/model.safetensors  the chosen model, once the run is complete
    RUN/base.safetensors   the network that the rest of the run started from: the base, or what pretraining gave
    RUN/teacher.safetensors  until the run is complete: what the teacher said of each training image
    RUN/last_good.safetensors  where the loss or the policy went astray: the best model before (``complete``: false)

Data order, augmentation and sampled masks of an epoch are drawn from a generator seeded by (seed, phase, epoch), so
that an epoch that was cut off and starts again sees exactly what it would have seen.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdexport.checkpoint.reading import read_torch
from bdexport.config import TrainConfig
from bdexport.errors import CheckpointError, TrainingError
from bdexport.files import read_bytes, write_bytes, write_json, write_text
from bdexport.json_text import MalformedError, finite, parse_json, why
from bdexport.limits import MAX_RESULT_BYTES

RUN_FILE, STATE_FILE, METRICS_FILE, MODEL_FILE = "run.json", "state.pt", "metrics.jsonl", "model.safetensors"
LAST_GOOD_FILE, BASE_FILE, TEACHER_FILE = "last_good.safetensors", "base.safetensors", "teacher.safetensors"
Weights = dict[str, torch.Tensor]


def weights_of(module: nn.Module) -> Weights:
    """A copy on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


@dataclass
class Best:
    """The best model so far by the validation split; ``score`` compares as a tuple, larger is better."""

    score: tuple[float, ...]
    weights: Weights
    figures: dict[str, Any]


@dataclass
class RunState:
    """Where a run stands: ``epoch`` epochs of phase ``phase`` are done."""

    phase: int = 0
    epoch: int = 0
    model: Weights = field(default_factory=dict)
    teacher: Weights | None = None
    optimisers: list[dict[str, Any]] = field(default_factory=list)
    critic: Weights = field(default_factory=dict)  # .. and what else is the marginal estimator's there
    memory: list[torch.Tensor] = field(default_factory=list)
    price: float = 0.0
    classifier: Weights = field(default_factory=dict)  # see :attr:`bdexport.train.phases.Setting.classifier`
    order: list[int] | None = None
    fixed_mask: str | None = None
    best: Best | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    base: dict[str, Any] | None = None  # how good the base was, see :mod:`bdexport.train.base`
    precisions: list[str] = field(default_factory=list)  # fp32 or bf16; both where a run went on elsewhere


def generator_for(seed: int, phase: int, epoch: int, device: str) -> torch.Generator:
    """The random source of one epoch of one phase."""
    generator = torch.Generator(device=device)
    return generator.manual_seed((seed * 1_000_003 + phase * 10_007 + epoch) % 2**63)


def save_state(run: Path, state: RunState) -> None:
    """Write state and metrics; a crash in between leaves the older, consistent pair's state."""
    best = state.best
    blob = dict(vars(state)) | {"best": None if best is None else [list(best.score), best.weights, best.figures]}
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into an assertion
    torch.save(blob, buffer)
    write_bytes(run / STATE_FILE, buffer.getvalue())
    save_metrics(run, state)


def save_metrics(run: Path, state: RunState) -> None:
    """Write the epochs of the state as ``metrics.jsonl``."""
    write_text(run / METRICS_FILE, "".join(json.dumps(finite(row)) + "\n" for row in state.history))


def load_state(run: Path) -> RunState | None:
    """The saved state, or None where the run has not finished its first epoch. Damaged: :class:`TrainingError`."""
    path = run / STATE_FILE
    if not path.is_file():
        return None
    try:
        blob = read_torch(path)  # compares the archive's checksums, too
        if blob["best"] is not None:
            score, weights, figures = blob["best"]
            blob["best"] = Best(tuple(score), weights, figures)
        if not all(isinstance(row, dict) and isinstance(row.get("phase"), str) for row in blob["history"]):
            raise ValueError("an epoch of its history names no phase")
        if not all(isinstance(blob[name], int) and blob[name] >= 0 for name in ("phase", "epoch")):
            raise ValueError("phase and epoch are no counts")
        if not all(precision in ("fp32", "bf16") for precision in blob.get("precisions", [])):
            raise ValueError("its precisions are none")
        return RunState(**blob)
    except (CheckpointError, RuntimeError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        text = error.reason.removeprefix(f"{path}: ") if isinstance(error, CheckpointError) else str(error)
        first = text.splitlines()[0] if text else type(error).__name__
        raise TrainingError(
            f"{path}: the run's state cannot be read ({first})", remedy="train into another folder, or delete this one"
        ) from error


def agree_on_run(run: Path, description: dict[str, Any]) -> bool:
    """Write ``description`` into a new run; for an existing one, check that nothing differs. True when it existed.

    A run that has not finished its first epoch has nothing to lose, and takes the new description; so does a phase's
    batch before its first epoch is finished, and the batch of evaluations: what too little memory asks for.
    """
    path = run / RUN_FILE
    if not path.exists():
        if run.is_dir() and not all(_is_leftover(entry) for entry in run.iterdir()):
            raise TrainingError(f"{run}: the folder is not empty and holds no run", remedy="choose another --out")
        write_json(path, description)
        return False
    try:
        before = parse_json(read_bytes(path, MAX_RESULT_BYTES))
        if not isinstance(before, dict):
            raise MalformedError("not an object")
        if not isinstance(before.get("settings", {}), dict):
            raise MalformedError("its settings are no object")
        if isinstance(before.get("settings"), dict):  # a group that its version did not have: as if at its defaults
            before["settings"] = TrainConfig().to_json() | before["settings"]
        unasked = [name for name in ("base_sha256", "teachers_sha256") if name not in before]  # by its older version
        before |= {name: description[name] for name in unasked if name in description}
        data = before.get("dataset")
        if isinstance(data, dict) and "sha256" not in data and "dataset" in description:
            unasked.append("dataset")
            before["dataset"] = data | {"sha256": description["dataset"]["sha256"]}
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: unreadable ({why(error)})", remedy="choose another --out") from error
    changed = differences(before, json.loads(json.dumps(description)))
    if changed and not any((run / name).exists() for name in (STATE_FILE, MODEL_FILE)):
        write_json(path, description)
        return False
    begun = _begun_phases(run) if changed else ()
    lasting = [text for name, text in changed.items() if not _may_change(name, begun)]
    if lasting:
        raise TrainingError(
            f"{run}: holds a run with other settings: {'; '.join(lasting)}",
            remedy="repeat the settings it was started with to resume it, or choose another --out",
        )
    if changed or unasked:
        write_json(path, description)
    return True


def began_before(run: Path, setting: str) -> bool:
    """Whether the run there was begun by a version that did not have this setting."""
    try:
        settings = parse_json(read_bytes(run / RUN_FILE, MAX_RESULT_BYTES))["settings"]
        return setting not in settings
    except (OSError, ValueError, KeyError, TypeError):  # no run, or one that agree_on_run complains about
        return False


def _begun_phases(run: Path) -> Collection[str] | None:
    """The phases with a finished epoch; None where that cannot be read."""
    try:
        lines = read_bytes(run / METRICS_FILE, MAX_RESULT_BYTES).decode().splitlines()
        return {json.loads(line)["phase"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _may_change(name: str, begun: Collection[str] | None) -> bool:
    """Whether a run can go on with another value of ``name``, e.g. ``settings.finetune.batch``."""
    if name == "settings.evaluation_batch":
        return True
    group, _, setting = name.removeprefix("settings.").partition(".")
    return setting == "batch" and begun is not None and group not in begun


def _is_leftover(entry: Path) -> bool:
    """What a kill in the middle of a write leaves (see :func:`bdexport.files.writing`)."""
    return entry.name.startswith(".") and entry.name.endswith(".partial")


def differences(before: Any, now: Any, name: str = "") -> dict[str, str]:
    """What differs, by its dotted name, as a text."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, str] = {}
        for key in sorted(before.keys() | now.keys()):
            found |= differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if before == now else {name: f"{name} was {before!r}, now {now!r}"}
