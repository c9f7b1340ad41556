"""What planning, preparing and measuring share: the cells that are not measured yet, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdexport.cli.console import StageProgress, err_console
from bdexport.errors import BdexportError
from bdexport.hardware import machine, package_versions
from benchmarks.suite.contestants import bundle_of
from benchmarks.suite.estimate import Eager, Pilots, eager_seconds, estimated, plan_table, scaled
from benchmarks.suite.footprint import footprints
from benchmarks.suite.networks import Network, network, variants
from benchmarks.suite.plan import Cell, Cost, SuiteConfig, cells, least_rounds, share_out
from benchmarks.suite.results import CELL_SCHEMA
from benchmarks.suite.store import Store

PACKAGES = ("bdexport", "numpy", "onnxruntime", "openvino", "torch", "tensorrt")
Building = Callable[[str, float, int], None]


@dataclass(eq=False)
class Run:
    """The cells of one command line, their networks and keys, and where results and pilots are."""

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
        least = [least_rounds(cell, config) for cell in todo]
        shares = share_out(costs, 60 * config.minutes, least, config.most_rounds)
        for line in plan_table(todo, costs, shares, config):
            err_console.print(line, soft_wrap=True)


def cell_footprint(cell: Cell, chosen: Network, config: SuiteConfig, work: Path, repeats: int) -> dict[str, Any]:
    """A footprint cell's result: every engine's load time and memory."""
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


def building(bar: StageProgress) -> Building:
    """A callback for builds that shows them in ``bar``."""
    task = bar.add_task("building bundles", total=None, visible=False)

    def report(what: str, done: float, total: int) -> None:
        bar.update(task, description=f"building: {what}", completed=done, total=total, visible=True)
        bar.refresh()

    return report
