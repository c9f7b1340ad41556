"""``--plan`` and ``--prepare``: what would be measured, and everything that can be done before measuring."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from time import monotonic

import torch

from bdexport.cli.console import err_console
from bdexport.cli.stages import quiet_progress
from bdexport.errors import BdexportError
from benchmarks.suite.contestants import bundle_of, field_of
from benchmarks.suite.estimate import FOOTPRINT_REPEATS, PREPARED, eager_seconds
from benchmarks.suite.networks import inputs, variants
from benchmarks.suite.plan import Cell, Cost, SuiteConfig
from benchmarks.suite.run import Building, Run, building, cell_footprint


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
    said: set[tuple[str, str]] = set()
    for number, cell in enumerate(todo):
        title = f"{number + 1}/{len(todo)} {cell.name}"
        err_console.print(f"{title}: preparing")
        eager_s = eager_seconds(1, cell, run.networks[cell], {})
        with quiet_progress() as bar:
            try:
                cost, missing = _prepared(cell, run, building(bar))
            except BdexportError as error:
                err_console.print(f"{title}: {error}", soft_wrap=True)
                continue
        run.pilots.save(cell, run.keys[cell], cost, eager_s)
        for name, why in missing.items():
            if (name, why) not in said:
                err_console.print(f"  without {name}: {why}", soft_wrap=True)
        said |= set(missing.items())
    todo = run.todo()
    run.plan(todo, [run.cost(cell) for cell in todo])


def _prepared(cell: Cell, run: Run, report: Building) -> tuple[Cost, dict[str, str]]:
    """A cell set up twice: the first time builds what is missing, the second is what a run will take."""
    config, chosen = run.config, run.networks[cell]
    if cell.usage == "footprint":
        begin = monotonic()
        made = cell_footprint(cell, chosen, config, run.work, repeats=1)
        return Cost(0.0, monotonic() - begin, PREPARED, FOOTPRINT_REPEATS), made["missing"]
    begin = monotonic()
    built = 0.0
    if "bdexport" in config.kinds:
        for backend, precision in variants():
            try:
                bundle_of(chosen, backend, precision, config, run.work, report)
            except BdexportError:
                continue  # the field says why
        built = monotonic() - begin
    given = inputs(chosen, cell, config)
    torch.set_num_threads(cell.threads)
    found = field_of(cell, chosen, given, config, run.work)
    with found.stack:
        round_s = found.round_seconds(config, cell.threads)
        return Cost(monotonic() - begin - built, round_s, PREPARED), found.missing


def _forget(work: Path) -> None:
    """Remove what the suite keeps in ``work``: bundles, graphs, scales and pilots, and nothing else."""
    for name in ("pilots", "graphs", "calibration", "cache"):
        rmtree(work / name, ignore_errors=True)
    for manifest in work.glob("resnet*-*/manifest.json"):
        rmtree(manifest.parent)
