"""The run: cell by cell, each stored as soon as it is measured; at the end JSON, a page, and plots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bdexport.cli.console import StageProgress, err_console, to_plain
from bdexport.cli.stages import quiet_progress, updates
from bdexport.errors import BdexportError
from bdexport.files import check_writable, write_json, write_text
from bdexport.hardware import machine, package_versions
from benchmarks.suite.contestants import field_of
from benchmarks.suite.footprint import footprints
from benchmarks.suite.measuring import measure
from benchmarks.suite.networks import Network, bundle, inputs, network, variants
from benchmarks.suite.plan import Cell, SuiteConfig, cells, seconds_for
from benchmarks.suite.results import CELL_SCHEMA, cell_result
from benchmarks.suite.store import Store
from benchmarks.suite.tables import markdown

SCHEMA = "bdexport.suite/1"
PACKAGES = ("bdexport", "numpy", "onnxruntime", "openvino", "torch", "tensorrt")
FOOTPRINT_REPEATS = 3
Building = Callable[[str, float, int], None]


def run_suite(config: SuiteConfig, out: Path, work: Path, fresh: bool = False) -> dict[str, Any]:
    """Measure what is not stored yet, as far as ``config.minutes`` go, and write ``out``: suite.json, .md and plots.

    ``fresh``: forget first what is stored.
    """
    check_writable(out / "suite.json")
    versions, here = package_versions(PACKAGES), machine()
    store = Store(out, versions, here["cpu"])
    if fresh:
        store.clear()
    plan = cells(config)
    networks = {cell: network(cell, config, work) for cell in plan}
    keys = {cell: store.key(config, one.sha256) for cell, one in networks.items()}
    todo = [cell for cell in plan if store.load(cell, keys[cell]) is None]
    if len(todo) < len(plan):
        err_console.print(f"{len(plan) - len(todo)} of {len(plan)} cells were measured before: {out}")
    not_measured: dict[str, str] = {}
    ends = monotonic() + 60 * config.minutes
    for done, cell in enumerate(todo):
        seconds = seconds_for(len(todo) - done, ends - monotonic(), config.cell_seconds)
        if seconds <= 0:
            not_measured[cell.name] = f"the {config.minutes:g} minutes were over; the same line goes on here"
            continue
        try:
            result = _measured(cell, networks[cell], config, work, seconds, f"{done + 1}/{len(todo)} {cell.name}")
        except BdexportError as error:
            not_measured[cell.name] = str(error)
            continue
        store.save(cell, keys[cell], result)
    found = [one for cell in plan if (one := store.load(cell, keys[cell])) is not None]
    data = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": here,
        "versions": versions,
        "config": asdict(config),
        "cells": found,
        "not_measured": not_measured,
    }
    write_json(out / "suite.json", to_plain(data))
    write_text(out / "suite.md", markdown(to_plain(data)))
    _plot(to_plain(data), out)
    for name, why in not_measured.items():
        err_console.print(f"not measured: {name}: {why}", soft_wrap=True)
    err_console.print(f"{len(found)} of {len(plan)} cells, with tables and plots: {out / 'suite.md'}", soft_wrap=True)
    return data


def _measured(
    cell: Cell, chosen: Network, config: SuiteConfig, work: Path, seconds: float, title: str
) -> dict[str, Any]:
    """One cell; ``seconds`` hold for setting up and measuring, but a third is left for measuring in any case."""
    begin = monotonic()
    torch.set_num_threads(cell.threads)
    with quiet_progress() as bar:
        err_console.print(f"{title}: setting up")
        if cell.usage == "footprint":
            return _footprint(cell, chosen, work)
        given = inputs(chosen, cell, config)
        contestants = field_of(cell, chosen, given, config, work, _building(bar))
        with contestants.stack:
            left = max(seconds / 3, seconds - (monotonic() - begin))
            rounds = measure(
                {one.name: one.step for one in contestants.contestants},
                left,
                least=config.least_rounds,
                most=config.most_rounds,
                warm_calls=config.warm_calls,
                pause_s=config.pause_s if cell.threads > 1 else 0.0,
                progress=updates(bar, f"{title}: measuring, everybody in turn"),
            )
            return cell_result(cell, chosen, given, contestants, rounds)


def _footprint(cell: Cell, chosen: Network, work: Path) -> dict[str, Any]:
    engines: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for backend, precision in variants():
        name = f"bdexport {backend} {precision}"
        try:
            opened = bundle(chosen, backend, precision, work)
            engines[name] = footprints(opened.path, cell.threads, FOOTPRINT_REPEATS)
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


def _plot(data: dict[str, Any], out: Path) -> None:
    try:
        from benchmarks.suite.plots import write_plots
    except ImportError as error:
        err_console.print(f'no plots: {error}; pip install "bdexport[report]"')
        return
    write_plots(data, out)
