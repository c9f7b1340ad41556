"""Cells on disk: one JSON file each, so that a run that was cut off goes on with the next."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bdexport.cli.console import to_plain
from bdexport.config import BuildConfig
from bdexport.files import write_json
from bdexport.json_text import MalformedError, parse_json
from bdexport.runtime.executors import EXECUTORS
from benchmarks.suite.plan import Cell, SuiteConfig

# What a measured cell depends on; the others only say which cells there are and how long they may take.
SETTINGS = (
    *("kinds", "sweep", "random_kept", "images", "dataset", "masks", "calibration_images", "compile_batches"),
    *("warm_calls", "warm_below_s", "pause_s"),
)


class Store:
    """The folder ``OUT/cells``."""

    def __init__(self, out: Path, versions: dict[str, str], cpu: str) -> None:
        self._folder = out / "cells"
        self._here = {"versions": versions, "cpu": cpu}

    def key(self, config: SuiteConfig, sha256: str) -> dict[str, Any]:
        """What must be the same for an old result to count: settings, bundles, versions, processor."""
        settings = {name: value for name, value in asdict(config).items() if name in SETTINGS}
        built = {"build": repr(BuildConfig()), "executors": list(EXECUTORS)}
        plain: dict[str, Any] = to_plain(settings | self._here | built | {"checkpoint": sha256})
        return plain

    def load(self, cell: Cell, key: dict[str, Any]) -> dict[str, Any] | None:
        """The cell's result, if it was measured under the same key; None for one that is missing or damaged."""
        try:
            data = parse_json(self._path(cell).read_bytes())
        except (OSError, MalformedError):
            return None
        whole = isinstance(data, dict) and data.get("key") == key and "result" in data
        return dict(data["result"]) if whole else None

    def clear(self) -> None:
        """Forget every cell."""
        for path in self._folder.glob("*.json"):
            path.unlink()

    def save(self, cell: Cell, key: dict[str, Any], result: dict[str, Any]) -> None:
        """Whole or not at all."""
        write_json(self._path(cell), to_plain({"key": key, "result": result}))

    def _path(self, cell: Cell) -> Path:
        return self._folder / f"{cell.name}.json"
