"""The run: cell by cell, each stored as soon as it is measured; at the end JSON, a page, and plots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bdexport.cli.console import err_console, to_plain
from bdexport.cli.stages import quiet_progress, updates
from bdexport.errors import BdexportError
from bdexport.files import check_writable, write_json, write_text
from bdexport.packages import install_line
from benchmarks.suite.contestants import field_of, pause_s
from benchmarks.suite.estimate import FOOTPRINT_REPEATS, PREPARED, scaled
from benchmarks.suite.measuring import measure
from benchmarks.suite.networks import inputs
from benchmarks.suite.plan import Cell, Cost, SuiteConfig, least_rounds, share_out
from benchmarks.suite.results import cell_result
from benchmarks.suite.run import Run, building, cell_footprint
from benchmarks.suite.tables import markdown

SCHEMA = "bdexport.suite/2"
LATE = 1.25  # a cell whose least rounds take this many times what is left of the time is not measured


def run_suite(
    config: SuiteConfig, out: Path, work: Path, fresh: bool = False, command: str = "python -m benchmarks.suite"
) -> dict[str, Any]:
    """Measure what is not stored yet, as far as ``config.minutes`` go, and write ``out``: suite.json, .md and plots.

    ``fresh``: forget first what is stored. ``command``: the line that the result names.
    """
    check_writable(out / "suite.json")
    run = Run(config, out, work)
    if fresh:
        run.store.clear()
    not_measured = _measure_cells(run)
    found = [one for cell in run.cells if (one := run.store.load(cell, run.keys[cell])) is not None]
    data = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "machine": run.here,
        "versions": run.versions,
        "config": _public(config),
        "cells": found,
        "not_measured": not_measured,
    }
    plain = without_places(to_plain(data), work)
    write_json(out / "suite.json", plain)
    write_text(out / "suite.md", markdown(plain))
    _plot(plain, out)
    for name, why in not_measured.items():
        err_console.print(f"not measured: {name}: {why}", soft_wrap=True)
    err_console.print(
        f"{len(found)} of {len(run.cells)} cells, with tables and plots: {out / 'suite.md'}", soft_wrap=True
    )
    return dict(plain)


def _measure_cells(run: Run) -> dict[str, str]:
    """Each cell that is not stored, in its share of what is left; the others' reasons by name.

    A cell that seems not to fit waits until the others are done: there may be more time left than it seemed.
    """
    todo, not_measured = run.todo(), dict[str, str]()
    if len(todo) < len(run.cells):
        err_console.print(f"{len(run.cells) - len(todo)} of {len(run.cells)} cells were measured before: {run.out}")
    costs = [run.cost(cell) for cell in todo]
    run.plan(todo, costs)
    clock = _Clock(monotonic() + 60 * run.config.minutes)
    waiting = list(zip(todo, costs, strict=True))
    for last_chance in (False, True):
        left, waiting = waiting, []
        for place, (cell, cost) in enumerate(left):
            rest = [scaled(other, clock.drift) for _, other in left[place:]]
            least = [least_rounds(other, run.config) for other, _ in left[place:]]
            share = share_out(rest, clock.left(), least, run.config.most_rounds)[0]
            if not share.rounds and (not last_chance or clock.left() <= 0):
                need = rest[0].setup_s + (rest[0].rounds or least[0]) * rest[0].round_s
                why = f"needs about {need:.0f} s, more than was left of --minutes {run.config.minutes:g}"
                not_measured[cell.name] = f"{why}; the same line goes on here"
                waiting.append((cell, cost))
                continue
            title = f"{len(todo) - len(left) + place + 1}/{len(todo)} {cell.name}"
            try:
                with clock.timing(cost) as took:
                    result, took.rounds = _measured(cell, run, (rest[1:], least), clock, title)
            except BdexportError as error:
                not_measured[cell.name] = str(error)
                continue
            not_measured.pop(cell.name, None)
            run.store.save(cell, run.keys[cell], result)
    return not_measured


@dataclass(eq=False)
class _Clock:
    """When the time is over, and how much longer than expected the cells have taken so far (``drift``)."""

    ends: float
    expected: float = 0.0
    taken: float = 0.0
    rounds: int = 0

    def left(self) -> float:
        """Seconds."""
        return self.ends - monotonic()

    @property
    def drift(self) -> float:
        """Above 1: slower than expected."""
        return self.taken / self.expected if self.expected > 0 else 1.0

    @contextmanager
    def timing(self, cost: Cost) -> Iterator[_Clock]:
        """Around one cell, whose ``rounds`` are set inside."""
        begin = monotonic()
        yield self
        self.taken += monotonic() - begin
        self.expected += cost.setup_s + self.rounds * cost.round_s


def _measured(
    cell: Cell, run: Run, needs: tuple[list[Cost], list[int]], clock: _Clock, title: str
) -> tuple[dict[str, Any], int]:
    """One cell's result and its number of rounds; ``needs``: costs of the cells after it, least rounds from it on.

    Once it is set up, a round's time is known, and shares are drawn with that.
    """
    config, chosen = run.config, run.networks[cell]
    torch.set_num_threads(cell.threads)
    with quiet_progress() as bar:
        err_console.print(f"{title}: setting up")
        if cell.usage == "footprint":
            return cell_footprint(cell, chosen, config, run.work, FOOTPRINT_REPEATS), FOOTPRINT_REPEATS
        given = inputs(chosen, cell, config)
        found = field_of(cell, chosen, given, config, run.work, building(bar))
        with found.stack:
            round_s = found.round_seconds(config, cell.threads)
            others, least = needs
            if least[0] * round_s > LATE * max(0.0, clock.left()):
                need = f"{least[0]} rounds of {round_s:.1f} s"
                raise BdexportError(f"{need} are more than was left of --minutes {config.minutes:g}")
            costs = [Cost(0.0, round_s, PREPARED), *others]
            share = share_out(costs, clock.left(), least, config.most_rounds)[0]
            rounds = measure(
                {one.name: one.step for one in found.contestants},
                share.seconds,
                least=least[0],
                most=config.most_rounds,
                warm_calls=found.warm_calls(config),
                pause_s=pause_s(config, cell.threads),
                progress=updates(bar, f"{title}: measuring, everybody in turn"),
            )
            result = cell_result(cell, chosen, given, found, rounds)
            return result, int(result["rounds"])


def _public(config: SuiteConfig) -> dict[str, Any]:
    """The settings without folders of this machine."""
    given = {name: path if path.startswith("zoo:") else Path(path).name for name, path in config.checkpoints.items()}
    return asdict(config) | {"data": None if config.data is None else config.data.name, "checkpoints": given}


def without_places(value: Any, work: Path) -> Any:
    """The value's texts without the folders of this machine, which errors may name."""
    if isinstance(value, dict):
        return {without_places(key, work): without_places(item, work) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item, work) for item in value]
    if isinstance(value, str):
        for place in (work.resolve(), work, Path.cwd(), Path.home()):
            value = value.replace(f"{place}/", "")
    return value


def _plot(data: dict[str, Any], out: Path) -> None:
    try:
        from benchmarks.suite.plots import write_plots
    except ImportError as error:
        err_console.print(f"no plots: {error}; {install_line('report')}")
        return
    write_plots(data, out)
