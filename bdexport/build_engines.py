"""Graphs -> engines: several at a time, each from the cache where an equal one was built before."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from bdexport.backends.base import Backend, BuildOptions
from bdexport.engine_cache import EngineCache, engine_key, engine_recipe
from bdexport.errors import BuildError, OutputError
from bdexport.export import Progress
from bdexport.files import UntrustedError, write_bytes
from bdexport.models.pair import BlockDropNet

BUILT, REUSED, REBUILT = "built", "reused", "rebuilt"  # what became of an engine


def build_engines(
    graphs: Mapping[str, Path],
    folder: Path,
    backend: Backend,
    options: BuildOptions,
    jobs: int,
    model: BlockDropNet,
    cache: EngineCache | None,
    report: Progress,
) -> tuple[dict[str, Path], dict[str, str], list[str]]:
    """Engine files by part, what became of each (built, reused, rebuilt: the cache's copy was damaged), and notes.

    ``jobs`` are built at a time; ``report`` as :data:`bdexport.export.Progress`. Raises :class:`BuildError`.
    """
    folder.mkdir()
    recipe = engine_recipe(backend, options)
    notes: list[str] = []
    going = _Going(report, len(graphs))
    options = replace(options, cache_folder=None if cache is None else cache.folder.parent, progress=going.step)

    def engine_of(part: str) -> tuple[Path, str]:
        engine = folder / f"{part}{backend.engine_suffix}"
        key = engine_key(recipe, graphs[part])
        outcome = BUILT if cache is None else _from_cache(cache, key, engine, part, notes)
        if outcome != REUSED:
            backend.build_part(part, graphs[part], engine, options, model)
            if not engine.is_file():
                raise BuildError(f"{part} [{backend.name}]: the backend left no engine", expected=engine.name)
            if cache is not None:
                _to_cache(cache, key, engine, notes)
        return engine, outcome

    # Threads, not processes: backends build in native code, which leaves the interpreter free.
    done: dict[str, tuple[Path, str]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(engine_of, part): part for part in graphs}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                going.finished(futures[future])
        except BaseException:  # a part that failed, or Ctrl-C: do not start the others, nor go on with those begun
            going.on = False
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    engines = {part: done[part][0] for part in graphs}
    return engines, {part: done[part][1] for part in graphs}, notes


class _Going:
    """How far the engines are, as the bar shows it, and whether to go on with them. Told by several threads."""

    def __init__(self, report: Progress, parts: int) -> None:
        self._report, self._parts = report, parts
        self._shares: dict[str, float] = {}
        self._lock = threading.Lock()
        self.on = True
        report("engines", 0, parts)

    def step(self, part: str, share: float) -> bool:
        """See :data:`bdexport.backends.base.PartProgress`."""
        with self._lock:
            self._shares[part] = share
            self._report("engines", sum(self._shares.values()), self._parts)
        return self.on

    def finished(self, part: str) -> None:
        """The part is there, built or from the cache."""
        self.step(part, 1.0)


def _from_cache(cache: EngineCache, key: str, engine: Path, part: str, notes: list[str]) -> str:
    try:
        data = cache.fetch(key)
    except ValueError:
        notes.append(f"engine cache: the copy of {part} was damaged and has been built again")
        return REBUILT
    except UntrustedError as error:
        _note_once(notes, f"engine cache: {error}; the engine was built instead")
        return BUILT
    except OSError as error:
        _note_once(notes, f"engine cache: {cache.folder} cannot be read ({error.strerror}); engines were built")
        return BUILT
    if data is None:
        return BUILT
    write_bytes(engine, data)
    return REUSED


def _to_cache(cache: EngineCache, key: str, engine: Path, notes: list[str]) -> None:
    try:
        cache.store(key, engine.read_bytes())
    except OutputError as error:  # the bundle does not need the cache, but its owner should know
        reason = getattr(error.__cause__, "strerror", None) or error
        _note_once(notes, f"engine cache: {cache.folder} cannot be written ({reason}); engines are not kept")


def _note_once(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)
