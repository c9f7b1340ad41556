"""The run: cell by cell, each stored as soon as it is measured; at the end JSON, a page, and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree
from time import monotonic
from typing import Any

import torch

from bdexport.cli.console import StageProgress, err_console, to_plain
from bdexport.cli.stages import quiet_progress, updates
from bdexport.errors import BdexportError
from bdexport.files import check_writable, write_json, write_text
from bdexport.hardware import machine, package_versions
from benchmarks.suite.contestants import bundle_of, field_of, pause_s
from benchmarks.suite.estimate import (
    FOOTPRINT_REPEATS,
    PREPARED,
    Eager,
    Pilots,
    eager_seconds,
    estimated,
    plan_table,
    scaled,
)
from benchmarks.suite.footprint import footprints
from benchmarks.suite.measuring import measure
from benchmarks.suite.networks import Network, inputs, network, variants
from benchmarks.suite.plan import Cell, Cost, SuiteConfig, cells, share_out
from benchmarks.suite.results import CELL_SCHEMA, cell_result
from benchmarks.suite.store import Store
from benchmarks.suite.tables import markdown

SCHEMA = "bdexport.suite/2"
PACKAGES = ("bdexport", "numpy", "onnxruntime", "openvino", "torch", "tensorrt")
LATE = 1.25  # a cell whose least rounds take this many times what is left of the time is not measured
Building = Callable[[str, float, int], None]


@dataclass(eq=False)
class Run:
    """What ``--plan``, ``--prepare`` and measuring share: the cells that are not measured yet, and where things are."""

    config: SuiteConfig
    out: Path
    work: Path

    def __post_init__(self) -> None:
        self.versions, self.here = package_versions(PACKAGES), machine()
        self.store = Store(self.out, self.versions, self.here["cpu"])
        self.pilots = Pilots(self.work)
        self.cells = cells(self.config)
        self.networks = {cell: network(cell, self.config, self.work) for cell in self.cells}
        self.keys = {cell: self.store.key(self.config, one.sha256) for cell, one in self.networks.items()}
        self._eager: Eager = {}

    def todo(self) -> list[Cell]:
        """Cells without a result, in order."""
        return [cell for cell in self.cells if self.store.load(cell, self.keys[cell]) is None]

    def cost(self, cell: Cell) -> Cost:
        """What it took when it was prepared, as fast as the machine is now; or an estimate."""
        found = self.pilots.load(cell, self.keys[cell])
        if found is None:
            return estimated(cell, self.networks[cell], self.config, self._eager)
        now = eager_seconds(1, cell, self.networks[cell], self._eager)
        return scaled(found[0], now / found[1])

    def plan(self, todo: list[Cell], costs: list[Cost]) -> None:
        """Print what is to come."""
        config = self.config
        shares = share_out(costs, 60 * config.minutes, config.least_rounds, config.most_rounds)
        for line in plan_table(todo, costs, shares, config):
            err_console.print(line, soft_wrap=True)


def show_plan(config: SuiteConfig, out: Path, work: Path) -> None:
    """What a run would measure, and what that needs."""
    run = Run(config, out, work)
    todo = run.todo()
    run.plan(todo, [run.cost(cell) for cell in todo])


def prepare(config: SuiteConfig, out: Path, work: Path, fresh: bool = False) -> None:
    """Build every bundle and contestant and make each call once or twice, so that a run starts measuring at once.

    What cells took is kept for :func:`run_suite`'s sharing out. ``fresh``: make again what ``work`` holds.
    """
    if fresh:
        _forget(work)
    run = Run(config, out, work)
    todo = [cell for cell in run.todo() if run.pilots.load(cell, run.keys[cell]) is None]
    for number, cell in enumerate(todo):
        title = f"{number + 1}/{len(todo)} {cell.name}"
        err_console.print(f"{title}: preparing")
        eager_s = eager_seconds(1, cell, run.networks[cell], {})
        with quiet_progress() as bar:
            try:
                cost, missing = _prepared(cell, run, _building(bar))
            except BdexportError as error:
                err_console.print(f"{title}: {error}", soft_wrap=True)
                continue
        run.pilots.save(cell, run.keys[cell], cost, eager_s)
        for name, why in missing.items():
            err_console.print(f"  without {name}: {why}", soft_wrap=True)
    todo = run.todo()
    run.plan(todo, [run.cost(cell) for cell in todo])


def _prepared(cell: Cell, run: Run, building: Building) -> tuple[Cost, dict[str, str]]:
    """A cell set up twice: the first time builds what is missing, the second is what a run will take."""
    config, chosen = run.config, run.networks[cell]
    if cell.usage == "footprint":
        begin = monotonic()
        made = _footprint(cell, chosen, config, run.work, repeats=1)
        return Cost(0.0, monotonic() - begin, PREPARED, FOOTPRINT_REPEATS), made["missing"]
    begin = monotonic()
    built = 0.0
    if "bdexport" in config.kinds:
        for backend, precision in variants():
            try:
                bundle_of(chosen, backend, precision, config, run.work, building)
            except BdexportError:
                continue  # the field says why
        built = monotonic() - begin
    given = inputs(chosen, cell, config)
    torch.set_num_threads(cell.threads)
    found = field_of(cell, chosen, given, config, run.work)
    with found.stack:
        round_s = found.round_seconds(config, cell.threads)
        return Cost(monotonic() - begin - built, round_s, PREPARED), found.missing


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
    plain = _without_places(to_plain(data), work)
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
            share = share_out(rest, clock.left(), run.config.least_rounds, run.config.most_rounds)[0]
            if not share.rounds and (not last_chance or clock.left() <= 0):
                need = rest[0].setup_s + (rest[0].rounds or run.config.least_rounds) * rest[0].round_s
                why = f"needs about {need:.0f} s, more than was left of --minutes {run.config.minutes:g}"
                not_measured[cell.name] = f"{why}; the same line goes on here"
                waiting.append((cell, cost))
                continue
            title = f"{len(todo) - len(left) + place + 1}/{len(todo)} {cell.name}"
            try:
                with clock.timing(cost) as took:
                    result, took.rounds = _measured(cell, run, share.rounds * rest[0].round_s, clock, title)
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


def _measured(cell: Cell, run: Run, seconds: float, clock: _Clock, title: str) -> tuple[dict[str, Any], int]:
    """One cell's result, measured for ``seconds`` at most but for the least rounds, and its number of rounds."""
    config, chosen = run.config, run.networks[cell]
    torch.set_num_threads(cell.threads)
    with quiet_progress() as bar:
        err_console.print(f"{title}: setting up")
        if cell.usage == "footprint":
            return _footprint(cell, chosen, config, run.work, FOOTPRINT_REPEATS), FOOTPRINT_REPEATS
        given = inputs(chosen, cell, config)
        found = field_of(cell, chosen, given, config, run.work, _building(bar))
        with found.stack:
            round_s = found.round_seconds(config, cell.threads)
            if config.least_rounds * round_s > LATE * max(0.0, clock.left()):
                need = f"{config.least_rounds} rounds of {round_s:.1f} s"
                raise BdexportError(f"{need} are more than was left of --minutes {config.minutes:g}")
            rounds = measure(
                {one.name: one.step for one in found.contestants},
                seconds,
                least=config.least_rounds,
                most=config.most_rounds,
                warm_calls=found.warm_calls(config),
                pause_s=pause_s(config, cell.threads),
                progress=updates(bar, f"{title}: measuring, everybody in turn"),
            )
            result = cell_result(cell, chosen, given, found, rounds)
            return result, int(result["rounds"])


def _footprint(cell: Cell, chosen: Network, config: SuiteConfig, work: Path, repeats: int) -> dict[str, Any]:
    engines: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for backend, precision in variants():
        name = f"bdexport {backend} {precision}"
        try:
            opened = bundle_of(chosen, backend, precision, config, work)
            engines[name] = footprints(opened.path, cell.threads, repeats)
        except BdexportError as error:
            missing[name] = str(error)
    about = {"model": cell.model, "usage": cell.usage, "batch": cell.batch, "threads": cell.threads}
    return {"schema": CELL_SCHEMA, "cell": about, "engines": engines, "missing": missing}


def _building(bar: StageProgress) -> Building:
    task = bar.add_task("building bundles", total=None, visible=False)

    def report(what: str, done: float, total: int) -> None:
        bar.update(task, description=f"building: {what}", completed=done, total=total, visible=True)
        bar.refresh()

    return report


def _forget(work: Path) -> None:
    """Remove what the suite keeps in ``work``: bundles, graphs, scales and pilots, and nothing else."""
    for name in ("pilots", "graphs", "calibration", "cache"):
        rmtree(work / name, ignore_errors=True)
    for manifest in work.glob("resnet*-*/manifest.json"):
        rmtree(manifest.parent)


def _public(config: SuiteConfig) -> dict[str, Any]:
    """The settings without folders of this machine."""
    given = {name: path if path.startswith("zoo:") else Path(path).name for name, path in config.checkpoints.items()}
    return asdict(config) | {"data": None if config.data is None else config.data.name, "checkpoints": given}


def _without_places(value: Any, work: Path) -> Any:
    """Texts without the folders of this machine, which errors may name."""
    if isinstance(value, dict):
        return {_without_places(key, work): _without_places(item, work) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item, work) for item in value]
    if isinstance(value, str):
        for place in (work.resolve(), work, Path.cwd(), Path.home()):
            value = value.replace(f"{place}/", "")
    return value


def _plot(data: dict[str, Any], out: Path) -> None:
    try:
        from benchmarks.suite.plots import write_plots
    except ImportError as error:
        err_console.print(f'no plots: {error}; pip install "bdexport[report]"')
        return
    write_plots(data, out)
