"""Results that can stand beside each other: accuracy against FLOPs and blocks, each with where it comes from.

A file of them (``bdexport.report.points/1``) is how comparison systems without a checkpoint of ours, or a table of
results that were measured earlier, get into a report; ``docs/report.md`` describes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any, Literal

from bdexport.errors import ReportError
from bdexport.json_text import MalformedError, json_kind, shown, why
from bdexport.report.fields import count, field, figure, is_figure, optional, text

Source = Literal["measured", "paper"]
POINTS_SCHEMA = "bdexport.report.points/1"
EVALUATE_SCHEMA = "bdexport.evaluate/1"

BASE, FULL, BLOCKDROP = "base", "full", "blockdrop"
METHODS = {  # what is known by name, in the order in which tables list them; any other method is listed after them
    BASE: "base, before training",
    FULL: "full network",
    "first-k": "FirstK",
    "random-k": "RandomK",
    "distribute-k": "DistributeK",
    "fixed": "fixed mask",
    "searched": "searched mask",
    BLOCKDROP: "BlockDrop",
    "blockdrop-seq": "BlockDrop-seq",
    "act": "ACT",
    "sact": "SACT",
    "pfec": "PFEC",
    "blockdrop-pfec": "BlockDrop + PFEC",
    "lccl": "LCCL",
}
MAX_POINTS = 500  # of one file: each has its number in the plots, which is placed beside all the others
FIXED_MASKS = ("first-k", "random-k", "distribute-k", "fixed", "searched")


@dataclass(frozen=True)
class Spread:
    """A mean over images with its standard deviation, where that is known."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Point:
    """One result. ``accuracy`` in percent; ``flops`` per image as the paper counts them; ``blocks`` kept per image.

    ``finetuned``: the network was trained for this way of dropping blocks (the paper's "ft"); None: does not apply or
    is not known. ``checkpoint``: which one was measured. ``where``: the paper's table, or the file it was read from.
    """

    label: str
    source: Source
    method: str
    accuracy: float
    finetuned: bool | None = None
    flops: Spread | None = None
    blocks: Spread | None = None
    num_blocks: int | None = None
    unique_masks: int | None = None
    architecture: str | None = None
    dataset: str | None = None
    split: str | None = None
    images: int | None = None
    checkpoint: str | None = None
    command: str | None = None
    where: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a points file holds it."""
        return asdict(self)


def method_name(method: str) -> str:
    """``DistributeK`` for ``distribute-k``; a method that is not known is called as it calls itself."""
    return METHODS.get(method, method)


def method_key(text: str) -> str:
    """One spelling: ``Distribute_K``, ``distributek`` and ``distribute-k`` are ``distribute-k``."""
    plain = text.strip().lower().replace("_", "-").replace(" ", "-")
    squeezed = {key.replace("-", ""): key for key in METHODS}
    return squeezed.get(plain.replace("-", ""), plain)


def method_order(method: str) -> tuple[int, str]:
    """Sorts methods as :data:`METHODS` lists them."""
    names = list(METHODS)
    return (names.index(method) if method in names else len(names), method)


# ---- reading -------------------------------------------------------------------------------------------------------


def points_from_file(data: dict[str, Any], where: str) -> list[Point]:
    """The points of a ``bdexport.report.points/1`` object; ReportError names the entry and the field that is wrong.

    Fields of the object itself (``dataset``, ``architecture``, ...) hold for every point that does not have its own.
    """
    entries = data.get("points")
    if not isinstance(entries, list):
        raise ReportError(f"{where}: points", got=json_kind(entries), expected="a list")
    if len(entries) > MAX_POINTS:
        expected = f"at most {MAX_POINTS}, as many as a plot can show"
        raise ReportError(f"{where}: points", got=len(entries), expected=expected, remedy="split the file")
    shared = {key: value for key, value in data.items() if key in _FIELDS}
    return [
        _point({**shared, **_object(entry, f"{where}: point {index}")}, f"{where}: point {index}", where)
        for index, entry in enumerate(entries, start=1)
    ]


def points_from_evaluation(data: dict[str, Any], where: str) -> list[Point]:
    """What ``bdexport evaluate --json`` wrote: the full network, the policy and each fixed mask. Raises ReportError."""
    try:
        return _evaluated(data, where)
    except MalformedError as error:
        raise ReportError(
            f"{where}: not a complete result of 'bdexport evaluate --json' ({why(error)})",
            remedy="write it again",
        ) from error


def _evaluated(data: dict[str, Any], where: str) -> list[Point]:
    checkpoint = text(data, "checkpoint")
    name = checkpoint_name(checkpoint)
    trained = optional(data, "trained", dict) or {}
    finetuned = optional(trained, "finetuned", bool)
    common: dict[str, Any] = {
        "source": "measured",
        "num_blocks": count(data, "num_blocks"),
        "architecture": text(data, "architecture"),
        "dataset": text(data, "dataset.name"),
        "split": text(data, "dataset.split"),
        "images": count(data, "dataset.images"),
        "checkpoint": checkpoint_key(checkpoint),
        "where": where,
    }
    words = ["bdexport", "evaluate", checkpoint, "--dataset", common["dataset"]]
    words += ["--split", common["split"]]
    base = optional(data, "base", dict)  # absent in results of older versions
    before = [] if base is None or not field(base, "here") else [base_point(name, base, **common)]
    decider = "policy" if "policy" in data else "gates"  # of a comparison system: what its gates decide
    outcome = optional(data, decider, dict)
    has_policy = outcome is not None
    found = [
        *before,
        full_point(
            f"{name}: full",
            figure(data, "full.accuracy", high=100),
            figure(data, "full.flops"),
            finetuned=trained.get("finetuned", True) or None if has_policy else None,
            command=shlex.join(words),
            **common,
        ),
    ]
    if outcome is not None:
        method = method_key(
            text(data, "gates.kind") if "gates" in data else optional(trained, "method", str) or BLOCKDROP
        )
        found.append(outcome_point(name, method, finetuned, outcome, command=shlex.join(words), **common))
    for title, fixed in (optional(data, "fixed", dict) or {}).items():
        found.append(_fixed(name, title, fixed, trained, has_policy, words, common))
    return found


def _fixed(
    name: str,
    title: str,
    outcome: dict[str, Any],
    trained: dict[str, Any],
    has_policy: bool,
    words: list[str],
    common: dict[str, Any],
) -> Point:
    """A fixed mask: the one that the network was finetuned under, or any other."""
    kind, _, kept = title.partition(" ")
    method = kind if kind in METHODS else "fixed"
    tuned, note = False, None
    if title == trained.get("mask"):
        method, tuned = method_key(text(trained, "method")), optional(trained, "finetuned", bool)
    elif has_policy:
        note = "a fixed mask on a network that was trained with a policy, not for this mask"
    elif trained.get("mask"):
        note = f"on a network that was finetuned under another mask, {text(trained, 'mask')}"
    words = [*words, "--fixed", kind, *(["--kept", kept] if kept else [])]
    label = f"{name}: {title}"
    return outcome_point(label, method, tuned, outcome, note=note, command=shlex.join(words), **common)


def full_point(label: str, accuracy: float, flops: float, *, num_blocks: int, **others: Any) -> Point:
    """The undropped network: every image costs the same."""
    return Point(
        label=label,
        method=FULL,
        accuracy=accuracy,
        flops=Spread(flops, 0.0),
        num_blocks=num_blocks,
        blocks=Spread(float(num_blocks), 0.0),
        unique_masks=1,
        **others,
    )


def base_point(name: str, base: dict[str, Any], **others: Any) -> Point:
    """The network that ``name`` was trained from, from the JSON of :class:`bdexport.base_figures.BaseFigures`."""
    return Point(
        label=f"{name}: its base ({text(base, 'name')})",
        method=BASE,
        accuracy=figure(base, "accuracy", high=100),
        blocks=Spread(float(others["num_blocks"]), 0.0),
        unique_masks=1,
        note=f"accuracy {text(base, 'how')}",
        **others,
    )


def outcome_point(
    label: str, method: str, finetuned: bool | None, outcome: Any, *, num_blocks: int, **others: Any
) -> Point:
    """From what :meth:`bdexport.evaluate.Outcome.to_json` gives. Raises MalformedError naming the field."""
    return Point(
        label=label,
        method=method,
        finetuned=finetuned,
        accuracy=figure(outcome, "accuracy", high=100),
        flops=Spread(figure(outcome, "flops.mean"), figure(outcome, "flops.std")),
        blocks=Spread(*(figure(outcome, f"blocks_used.{name}", high=num_blocks) for name in ("mean", "std"))),
        unique_masks=count(outcome, "unique_masks"),
        num_blocks=num_blocks,
        **others,
    )


def checkpoint_key(path: object) -> str:
    """The same text for a run folder and for the model in it."""
    plain = PurePath(str(path))
    return (plain.parent if plain.name == "model.safetensors" else plain).as_posix()


def checkpoint_name(path: object) -> str:
    """What to call a checkpoint: its run's folder or its file, without the folders above."""
    return PurePath(checkpoint_key(path)).name or str(path)


def _point(entry: dict[str, Any], what: str, where: str) -> Point:
    unknown = sorted(set(entry) - set(_FIELDS))
    if unknown:
        raise ReportError(f"{what}: unknown field", got=unknown[0], expected=f"one of {', '.join(_FIELDS)}")
    label = entry.get("label")
    if not isinstance(label, str) or not label:
        raise ReportError(f"{what}: label", got=shown(label), expected="a text")
    source = entry.get("source", "measured")
    if source not in ("measured", "paper"):
        raise ReportError(f"{what}: source", got=shown(source), expected="measured or paper")
    accuracy = _number(entry, "accuracy", what)
    if accuracy is None or not 0 <= accuracy <= 100:
        raise ReportError(f"{what}: accuracy", got=accuracy, expected="0 to 100 (percent)")
    for name in ("method", "architecture", "dataset", "split", "command", "checkpoint", "where", "note"):
        if not isinstance(entry.get(name), str | None):
            raise ReportError(f"{what}: {name}", got=shown(entry[name]), expected="a text or null")
    if not isinstance(entry.get("finetuned"), bool | None):
        raise ReportError(f"{what}: finetuned", got=shown(entry["finetuned"]), expected="true, false or null")
    return Point(
        label=label,
        source="paper" if source == "paper" else "measured",
        method=method_key(entry.get("method") or BLOCKDROP),
        accuracy=accuracy,
        finetuned=entry.get("finetuned"),
        flops=_spread(entry, "flops", what),
        blocks=_spread(entry, "blocks", what),
        num_blocks=_whole(entry, "num_blocks", what),
        unique_masks=_whole(entry, "unique_masks", what),
        architecture=entry.get("architecture"),
        dataset=entry.get("dataset"),
        split=entry.get("split"),
        images=_whole(entry, "images", what),
        checkpoint=entry.get("checkpoint"),
        command=entry.get("command"),
        where=entry.get("where") or where,
        note=entry.get("note"),
    )


_FIELDS = tuple(Point.__dataclass_fields__)


def _object(entry: Any, what: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ReportError(what, got=json_kind(entry), expected="an object")
    return entry


def _number(entry: dict[str, Any], name: str, what: str) -> float | None:
    value = entry.get(name)
    if value is None:
        return None
    if not is_figure(value, low=0):
        raise ReportError(f"{what}: {name}", got=shown(value), expected="a number, 0 or more")
    return float(value)


def _whole(entry: dict[str, Any], name: str, what: str) -> int | None:
    value = _number(entry, name, what)
    if value is not None and value != int(value):
        raise ReportError(f"{what}: {name}", got=value, expected="a whole number")
    return None if value is None else int(value)


def _spread(entry: dict[str, Any], name: str, what: str) -> Spread | None:
    """A number, or an object with a mean and, where it is known, a std."""
    value = entry.get(name)
    if not isinstance(value, dict):
        mean = _number(entry, name, what)
        return None if mean is None else Spread(mean)
    mean = _number(value, "mean", f"{what}: {name}")
    if mean is None:
        raise ReportError(f"{what}: {name}", got="no mean", expected='{"mean": .., "std": ..}')
    return Spread(mean, _number(value, "std", f"{what}: {name}"))


# ---- putting together ----------------------------------------------------------------------------------------------


def without_repeats(points: Iterable[Point]) -> list[Point]:
    """Results that are the same measurement read twice (from a run and from its evaluation) once, the first of them."""
    seen: set[tuple[object, ...]] = set()
    kept = []
    for point in points:
        blocks = None if point.blocks is None else round(point.blocks.mean, 6)
        what = (point.source, point.checkpoint or point.label, point.method, point.accuracy, blocks)
        key = (*what, point.dataset, point.split, point.images)
        if key not in seen:
            seen.add(key)
            kept.append(point)
    return kept


def with_training(points: Iterable[Point], trained: dict[str, tuple[str, bool | None]]) -> list[Point]:
    """Fill in how a checkpoint was trained, ``{checkpoint: (method, finetuned)}``, where a result does not say it."""
    filled = []
    for point in points:
        known = trained.get(point.checkpoint or "")
        if known is not None and point.method == BLOCKDROP and point.finetuned is None:
            point = replace(point, method=known[0], finetuned=known[1])
        filled.append(point)
    return filled


def in_order(points: Iterable[Point]) -> list[Point]:
    """By network (small ones first), then method, then the most expensive first."""
    return sorted(
        points,
        key=lambda p: (
            p.num_blocks or 0,
            p.architecture or "",
            method_order(p.method),
            -(p.blocks.mean if p.blocks else 0.0),
            p.label,
        ),
    )


def comparable(points: Iterable[Point]) -> list[Point]:
    """Measured points that may stand in one plot: those of the test set, or all if none was measured there."""
    measured = [point for point in points if point.source == "measured"]
    return [point for point in measured if point.split == "test"] or measured


def datasets(points: Iterable[Point]) -> list[str]:
    """Names of the data sets that something was measured on, in the order of their first point."""
    return list(dict.fromkeys(point.dataset for point in points if point.source == "measured" and point.dataset))
