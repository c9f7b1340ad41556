"""Engines that were built before, by what they were built from. Two engines of equal shape hold different weights:
a key covers the graph's bytes with its weights, and never a path or a shape alone.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from pathlib import Path

from bdexport import __version__
from bdexport.backends.base import Backend, BuildOptions
from bdexport.files import check_owner, make_cache, open_regular, sha256_file, write_bytes


def engine_recipe(backend: Backend, options: BuildOptions) -> str:
    """Everything but the graph that an engine depends on: options, backend, its versions and code, the machine."""
    recipe = {
        "options": options.recipe(),
        "backend": backend.name,
        "versions": dict(backend.versions()) | {"bdexport": __version__},
        "fingerprint": backend.fingerprint(),
        "code": _code_digest(Path(inspect.getfile(type(backend))).parent),
    }
    return json.dumps(recipe, sort_keys=True)


def engine_key(recipe: str, graph: Path) -> str:
    """SHA-256 over a recipe and the bytes of a graph file, weights included."""
    return hashlib.sha256(f"{sha256_file(graph)}\n{recipe}".encode()).hexdigest()


def _code_digest(package: Path) -> str:
    """SHA-256 over the backends' sources: a change in how engines are built must not meet engines from before it."""
    digests = [f"{file.name} {sha256_file(file)}" for file in sorted(package.glob("*.py"))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


class EngineCache:
    """Engines in a folder, one file per key: a line with the SHA-256 of the rest, then the engine.

    Files appear whole or not at all, so several builds may share one folder.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.folder = folder, folder / "engines"

    def path(self, key: str) -> Path:
        """Where the engine of ``key`` is or would be."""
        return self.folder / key[:2] / key

    def fetch(self, key: str) -> bytes | None:
        """The engine, or None where there is none.

        Raises ValueError for a damaged entry, OSError if unreadable, UntrustedError for one that others can write.
        """
        try:
            with open_regular(self.path(key)) as file:
                check_owner(self.path(key), os.fstat(file.fileno()))
                digest, _, engine = file.read().partition(b"\n")
        except FileNotFoundError:
            return None
        if hashlib.sha256(engine).hexdigest().encode() != digest:
            raise ValueError(f"{self.path(key)} is damaged")
        return engine

    def store(self, key: str, engine: bytes) -> None:
        """Keep an engine. Raises OutputError where the folder cannot be written."""
        make_cache(self.root)
        write_bytes(self.path(key), hashlib.sha256(engine).hexdigest().encode() + b"\n" + engine, private=True)
