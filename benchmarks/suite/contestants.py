"""bdexport and what it is measured against, as calls on the images of a round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import bdexport
from bdexport.backends import backend_class, get_backend
from bdexport.bundle import Bundle, Manifest
from bdexport.errors import BackendError, BdexportError
from bdexport.parts import POLICY, Masks
from bdexport.runtime import Orchestrator
from bdexport.runtime.executors import executor_name, usable_executors
from benchmarks.suite.baselines import GPU_ONLY, dynamic_baselines, full_baselines
from benchmarks.suite.int8 import scales_kept, scales_source
from benchmarks.suite.measuring import Step, call_seconds
from benchmarks.suite.networks import Inputs, Network, bundle, variants
from benchmarks.suite.plan import Cell, SuiteConfig

Group = Literal["full", "dynamic", "policy"]
Progress = Callable[[str, float, int], None]


@dataclass(frozen=True, eq=False)
class Contestant:
    """One side of a cell. ``engine``: whose it is, e.g. "bdexport onnxruntime fp32"; ``kept``: of forced masks;
    ``auto``: the reason why this executor is what the bundle's ``auto`` means, None where it is not.
    """

    name: str
    group: Group
    precision: str
    step: Step
    engine: str
    executor: str | None = None
    kept: int | None = None
    auto: str | None = None


@dataclass(eq=False)
class Field:
    """Everybody of one cell. ``masks_of``: by engine, what its policy decides on a round, or what is forced;
    ``seconds`` and ``logits``: by contestant, what its first call took and returned.
    """

    contestants: list[Contestant] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    masks_of: dict[str, Callable[[int | None, int], Masks]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    logits: dict[str, Any] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)

    def add(self, name: str, make: Callable[[], Contestant]) -> None:
        """Add what ``make`` gives, or the reason why it cannot be here."""
        try:
            contestant = make()
            self.logits[name], self.seconds[name] = call_seconds(contestant.step)
        except Exception as error:  # a baseline that fails here is a line of the table, whatever it raises
            self.missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return
        self.contestants.append(contestant)

    def warm_calls(self, config: SuiteConfig) -> dict[str, int]:
        """Untimed calls before each timed one, by contestant."""
        return {
            one.name: config.warm_calls if self.seconds[one.name] < config.warm_below_s else 0
            for one in self.contestants
        }

    def round_seconds(self, config: SuiteConfig, threads: int) -> float:
        """What everybody's turn takes, from their first calls."""
        pause, warm = pause_s(config, threads), self.warm_calls(config)
        return sum((1 + warm[one.name]) * self.seconds[one.name] + pause for one in self.contestants)


def pause_s(config: SuiteConfig, threads: int) -> float:
    """Between two turns: only pools of several threads spin on after a call."""
    return config.pause_s if threads > 1 else 0.0


def field_of(
    cell: Cell,
    network: Network,
    inputs: Inputs,
    config: SuiteConfig,
    work: Path,
    progress: Progress | None = None,
) -> Field:
    """Everybody of a cell, ready to be called. Close ``stack`` afterwards."""
    found = Field()
    levels: list[int | None] = list(inputs.masks) or [None]
    for baseline in full_baselines(cell, network, config, work):
        found.add(baseline.name, lambda baseline=baseline: _full(baseline, inputs))  # type: ignore[misc]
    for other in dynamic_baselines(cell, network, config):
        for level in levels:
            name = _named(other.name, level, levels)
            found.add(name, lambda b=other, n=name, k=level: _dynamic(b, n, k, inputs))  # type: ignore[misc]
    found.missing |= GPU_ONLY() if "cuda" in config.kinds else {}
    for backend, precision in variants() if "bdexport" in config.kinds else ():
        _Bundled(found, cell, network, inputs, config, work).add(backend, precision, levels, progress)
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


@dataclass(frozen=True, eq=False)
class _Bundled:
    """Adds a bundle's policy, full engine and executors to a field."""

    found: Field
    cell: Cell
    network: Network
    inputs: Inputs
    config: SuiteConfig
    work: Path

    def add(self, backend: str, precision: str, levels: list[int | None], progress: Progress | None) -> None:
        found, inputs = self.found, self.inputs
        engine = f"bdexport {backend} {precision}"
        try:
            opened = bundle_of(self.network, backend, precision, self.config, self.work, progress)
            # Random masks are never among a bundle's frequent ones: fused would run as chain, and is not measured.
            fused = self.cell.usage != "random"
            default = bdexport.load(opened, threads=self.cell.threads, executor="chain", fused=fused)
            found.stack.enter_context(default)
        except BackendError as error:
            here = backend_class(backend)().available().ok
            found.missing[engine if here else f"bdexport {backend}"] = str(error)
            return
        except BdexportError as error:
            found.missing[engine] = str(error)
            return
        found.manifests[engine] = opened.manifest
        found.masks_of[engine] = _masks_of(default, inputs)
        session = default.session

        def decide(number: int) -> None:
            session.get(POLICY, session.run(POLICY, session.put(POLICY, inputs.batch_of(number))))

        full: Step = lambda number: default.full(inputs.batch_of(number)).logits  # noqa: E731
        found.add(f"{engine}, policy", lambda: Contestant(f"{engine}, policy", "policy", precision, decide, engine))
        found.add(f"{engine}, full", lambda: Contestant(f"{engine}, full", "full", precision, full, engine))
        for executor in usable_executors(session, opened.manifest):
            orchestrator = default if executor == default.executor else Orchestrator(opened, session, executor)
            orchestrator.prepare(inputs.batch)  # whatever first calls would do, every fused path included
            auto = _auto_reason(orchestrator, fused)
            for level in levels:
                name = _named(f"{engine}, {executor}", level, levels)
                step = _own_step(orchestrator, decide, inputs, level)
                one = Contestant(name, "dynamic", precision, step, engine, executor, level, auto)
                found.add(name, lambda one=one: one)  # type: ignore[misc]


def bundle_of(
    network: Network,
    backend: str,
    precision: str,
    config: SuiteConfig,
    work: Path,
    progress: Progress | None = None,
) -> Bundle:
    """The network's bundle, from ``work`` or built now; a backend that cannot run here is not built for."""
    get_backend(backend)
    calibration = partial(scales_kept, network, config, work, progress)
    source = scales_source(network, config)
    return bundle(network, backend, precision, work, calibration, source, progress)


def _auto_reason(orchestrator: Orchestrator, fused: bool) -> str | None:
    choice, reason = executor_name("auto", orchestrator.manifest)
    if choice == "fused" and not fused:
        choice, reason = "chain", f"{reason}; no mask of this cell has an engine of its own"
    return reason if choice == orchestrator.executor else None


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
