"""bdexport and what it is measured against, as calls on the images of a round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import bdexport
from bdexport.bundle import Bundle, Manifest
from bdexport.errors import BdexportError, UsageError
from bdexport.parts import POLICY, Masks
from bdexport.runtime import Orchestrator
from bdexport.runtime.executors import EXECUTORS
from benchmarks.suite.baselines import GPU_ONLY, dynamic_baselines, full_baselines
from benchmarks.suite.measuring import Step
from benchmarks.suite.networks import Inputs, Network, bundle, variants
from benchmarks.suite.plan import Cell, SuiteConfig

Group = Literal["full", "dynamic", "policy"]


@dataclass(frozen=True, eq=False)
class Contestant:
    """One side of a cell. ``engine``: whose it is, e.g. "bdexport onnxruntime fp32"; ``kept``: of forced masks."""

    name: str
    group: Group
    precision: str
    step: Step
    engine: str
    executor: str | None = None
    kept: int | None = None


@dataclass(eq=False)
class Field:
    """Everybody of one cell. ``masks_of``: by engine, what its policy decides on a round, or what is forced."""

    contestants: list[Contestant] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    masks_of: dict[str, Callable[[int | None, int], Masks]] = field(default_factory=dict)
    executors: dict[str, str] = field(default_factory=dict)  # what "auto" means and why, by contestant
    stack: ExitStack = field(default_factory=ExitStack)

    def add(self, name: str, make: Callable[[], Contestant]) -> None:
        """Add what ``make`` gives, or the reason why it cannot be here."""
        try:
            contestant = make()
            contestant.step(0)
        except Exception as error:  # a baseline that fails here is a line of the table, whatever it raises
            self.missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return
        self.contestants.append(contestant)


def field_of(
    cell: Cell,
    network: Network,
    inputs: Inputs,
    config: SuiteConfig,
    work: Path,
    progress: Callable[[str, float, int], None] | None = None,
) -> Field:
    """Everybody of a cell, ready to be called. Close ``stack`` afterwards."""
    found = Field()
    levels: list[int | None] = list(inputs.masks) or [None]
    for baseline in full_baselines(cell, network, config):
        found.add(baseline.name, lambda baseline=baseline: _full(baseline, inputs))  # type: ignore[misc]
    for other in dynamic_baselines(cell, network):
        for level in levels:
            name = _named(other.name, level, levels)
            found.add(name, lambda b=other, n=name, k=level: _dynamic(b, n, k, inputs))  # type: ignore[misc]
    found.missing |= GPU_ONLY()
    for backend, precision in variants():
        _add_bundle(found, cell, network, inputs, levels, (backend, precision), work, progress)
    return found


def _named(name: str, level: int | None, levels: list[int | None]) -> str:
    return name if len(levels) == 1 else f"{name}, {level} blocks"


def _full(baseline: Any, inputs: Inputs) -> Contestant:
    call = baseline.make()
    return Contestant(
        baseline.name, "full", baseline.precision, lambda number: call(inputs.batch_of(number)), baseline.name
    )


def _dynamic(baseline: Any, name: str, level: int | None, inputs: Inputs) -> Contestant:
    call = baseline.make(level is not None)

    def step(number: int) -> Any:
        masks = None if level is None else inputs.masks_of(level, number)
        return call(inputs.batch_of(number), masks)

    return Contestant(name, "dynamic", baseline.precision, step, baseline.name, kept=level)


def _add_bundle(
    found: Field,
    cell: Cell,
    network: Network,
    inputs: Inputs,
    levels: list[int | None],
    variant: tuple[str, str],
    work: Path,
    progress: Callable[[str, float, int], None] | None,
) -> None:
    backend, precision = variant
    engine = f"bdexport {backend} {precision}"
    try:
        opened = bundle(network, backend, precision, work, progress)
        default = found.stack.enter_context(_load(opened, cell.threads))
        default.prepare(cell.batch)
    except BdexportError as error:
        found.missing[engine] = str(error)
        return
    found.manifests[engine] = opened.manifest
    found.masks_of[engine] = _masks_of(default, inputs)
    session = default.session

    def decide(number: int) -> None:
        session.get(POLICY, session.run(POLICY, session.put(POLICY, inputs.batch_of(number))))

    found.add(engine, lambda: Contestant(f"{engine}, policy", "policy", precision, decide, engine))
    full: Step = lambda number: default.full(inputs.batch_of(number)).logits  # noqa: E731
    found.add(engine, lambda: Contestant(f"{engine}, full", "full", precision, full, engine))
    names = [*EXECUTORS, "auto"] if len(EXECUTORS) > 1 else list(EXECUTORS)
    for executor in names:
        for level in levels:
            name = _named(f"{engine}, {executor}", level, levels)

            def make(executor: str = executor, level: int | None = level, name: str = name) -> Contestant:
                orchestrator = Orchestrator(opened, session, executor)
                found.executors[name] = f"{orchestrator.executor}: {orchestrator.executor_reason}"
                step = _own_step(orchestrator, decide, inputs, level)
                return Contestant(name, "dynamic", precision, step, engine, executor, level)

            found.add(name, make)


def _load(opened: Bundle, threads: int) -> Orchestrator:
    """Loaded for the executor that needs most: the last in the table that this bundle has. The others can share it."""
    for executor in [*EXECUTORS][:0:-1]:
        try:
            return bdexport.load(opened, threads=threads, executor=executor)
        except UsageError:
            continue  # its line says why: it is asked for again, by name
    return bdexport.load(opened, threads=threads, executor=next(iter(EXECUTORS)))


def _own_step(orchestrator: Orchestrator, decide: Step, inputs: Inputs, level: int | None) -> Step:
    """The policy and what it decides; where masks are forced, the policy all the same."""
    if level is None:
        return lambda number: orchestrator(inputs.batch_of(number)).logits

    def forced(number: int) -> Any:
        decide(number)
        return orchestrator(inputs.batch_of(number), masks=inputs.masks_of(level, number)).logits

    return forced


def _masks_of(orchestrator: Orchestrator, inputs: Inputs) -> Callable[[int | None, int], Masks]:
    known: dict[int, Masks] = {}

    def masks(level: int | None, number: int) -> Masks:
        if level is not None:
            return inputs.masks_of(level, number)
        number %= len(inputs.images) // inputs.batch
        if number not in known:
            known[number] = orchestrator(inputs.batch_of(number)).masks
        return known[number]

    return masks
