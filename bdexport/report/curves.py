"""Training curves: the epochs of ``metrics.jsonl`` as one series per figure, with the phases' places. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdexport.errors import ReportError
from bdexport.json_text import MalformedError, why
from bdexport.report.fields import is_figure, object_of, read_bytes, text

Series = tuple[float | None, ...]

FIGURES = {  # what is plotted -> where a row of metrics.jsonl has it
    "loss": ("train", "loss"),
    "train_accuracy": ("train", "accuracy"),
    "validation_accuracy": ("validation", "accuracy"),
    "train_reward": ("train", "reward"),
    "validation_reward": ("validation", "reward"),
    "train_blocks": ("train", "blocks_used"),
    "blocks_mean": ("validation", "blocks_used", "mean"),
    "blocks_std": ("validation", "blocks_used", "std"),
    "unique_masks": ("validation", "unique_masks"),
}


@dataclass(frozen=True)
class PhaseSpan:
    """A phase of training: epochs ``first`` to ``last`` of the run, counted from 1, both included."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Curves:
    """One run: ``series[name][e]`` belongs to epoch e + 1 of the run; None where the phase has no such figure.

    ``chosen``: the epoch whose model was kept (the first with the best score); None before finetuning.
    """

    name: str
    epochs: int
    phases: tuple[PhaseSpan, ...]
    series: dict[str, Series]
    chosen: int | None

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "name": self.name,
            "epochs": self.epochs,
            "phases": [vars(phase) for phase in self.phases],
            "series": {name: list(values) for name, values in self.series.items()},
            "chosen": self.chosen,
        }


MAX_SPANS = 50  # changes of the phase; a run has four phases, and every change is drawn
MENDED = "give the run's command again, which mends it"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``. Raises ReportError naming the line that is damaged."""
    rows: list[dict[str, Any]] = []
    spans = 0
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            row = object_of(line)
            phase = text(row, "phase")
            spans += not rows or phase != rows[-1]["phase"]
            if spans > MAX_SPANS:
                raise MalformedError(f"the phase changes more than {MAX_SPANS} times")
        except MalformedError as error:
            raise ReportError(f"{path}: line {number} is damaged ({why(error)})", remedy=MENDED) from error
        rows.append(row)
    return rows


def curves_of(name: str, rows: list[dict[str, Any]]) -> Curves:
    """Series and phases of a run's epochs, in the order in which they were trained."""
    return Curves(
        name=name,
        epochs=len(rows),
        phases=_phases(rows),
        series={key: tuple(_figure(row, place) for row in rows) for key, place in FIGURES.items()},
        chosen=_chosen(rows),
    )


def _figure(row: dict[str, Any], place: tuple[str, ...]) -> float | None:
    value: Any = row
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if is_figure(value) else None


def _phases(rows: list[dict[str, Any]]) -> tuple[PhaseSpan, ...]:
    spans: list[PhaseSpan] = []
    for epoch, row in enumerate(rows, start=1):
        if spans and spans[-1].name == row["phase"]:
            spans[-1] = PhaseSpan(row["phase"], spans[-1].first, epoch)
        else:
            spans.append(PhaseSpan(row["phase"], epoch, epoch))
    return tuple(spans)


def _chosen(rows: list[dict[str, Any]]) -> int | None:
    scored = [
        (tuple(row["score"]), epoch)
        for epoch, row in enumerate(rows, start=1)
        if isinstance(row.get("score"), list) and all(is_figure(value) for value in row["score"])
    ]
    return max(scored, key=lambda pair: (pair[0], -pair[1]))[1] if scored else None
