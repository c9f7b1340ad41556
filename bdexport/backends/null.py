"""The null backend: right shapes, no arithmetic, declared latencies.

It lets the orchestrator, bench and reports be tested, and their overhead be measured, without hardware. What a part
gives says which path ran: every image is filled with one number, its *tag*. A block that is kept adds ``index + 1`` to
the tag, everything else passes it on, so the logits hold the sum over the blocks that ran. The policy answers image n
with row ``int(|tag|) % rows`` of its table of masks. An engine file is JSON::

    {"schema": "bdexport-null-engine/1", "part": "policy", "latency_ms": 0.0, "masks": ["1101..", ...] or null}
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport import files
from bdexport.backends.arrays import ArrayRows, closed_error, no_device_error
from bdexport.backends.base import Availability, BuildOptions, BuildsWhereItRuns, Readable, RunOptions
from bdexport.errors import BackendError, InputError
from bdexport.json_text import MalformedError, parse_json, why
from bdexport.parts import FULL, POLICY, Masks, mask_from_text

if TYPE_CHECKING:
    from bdexport.bundle import Bundle, Manifest
    from bdexport.models.pair import BlockDropNet

SCHEMA = "bdexport-null-engine/1"
MAX_LATENCY_MS = 60_000  # of a declared part: nobody waits for longer
KEPT, DROPPED = 0.9, 0.1  # keep-probabilities that the null policy gives
Array = NDArray[Any]


class NullBackend(BuildsWhereItRuns):
    """Builds engines that are declarations. ``latency_ms`` by part name; ``masks`` are what the policy will answer."""

    name = "null"
    precisions: tuple[str, ...] = ("fp32",)
    engine_suffix = ".json"
    computes = False

    def __init__(self, latency_ms: Mapping[str, float] | None = None, masks: Sequence[str] | None = None) -> None:
        self.latency_ms, self.masks = dict(latency_ms or {}), None if masks is None else list(masks)

    def available(self) -> Availability:
        """Always."""
        return Availability(True, "needs nothing")

    def versions(self) -> Mapping[str, str]:
        """Nothing that an engine depends on, but for the format of its file."""
        return {"null": SCHEMA.rpartition("/")[2]}

    def fingerprint(self) -> str:
        """Engines run on every machine."""
        return "any"

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        """Write the declaration of one part; ``graph`` is not read."""
        data = {
            "schema": SCHEMA,
            "part": part,
            "latency_ms": self.latency_ms.get(part, 0.0),
            "masks": self.masks if part == POLICY else None,
        }
        files.write_json(engine, data)

    def open(self, bundle: Bundle, options: RunOptions) -> NullSession:
        """Read every declaration of ``bundle``."""
        if options.device != "cpu":
            raise no_device_error(self.name, options.device, "cpu")
        engines = {part: _read_engine(bundle.engine_file(part), part) for part in bundle.manifest.parts}
        return NullSession(bundle.manifest, engines)


class NullSession(ArrayRows):
    """See :class:`bdexport.backends.base.Session`."""

    def __init__(self, manifest: Manifest, engines: dict[str, dict[str, Any]]) -> None:
        self.device, self.threads = "cpu", 1
        self.notes: tuple[str, ...] = ("null: no arithmetic; the outputs mean nothing",)
        self._outputs = {name: entry.output.shape for name, entry in manifest.parts.items()}
        self._steps = {name: _step(name, manifest.num_blocks) for name in manifest.parts}
        self._latency_s = {name: engine["latency_ms"] / 1e3 for name, engine in engines.items()}
        self._masks = _mask_table(engines[POLICY]["masks"], manifest.num_blocks)
        self._closed = False

    def put(self, part: str, array: Array) -> Array:
        return array

    def get(self, part: str, tensor: Array) -> Array:
        return tensor.copy()

    def run(self, part: str, x: Array) -> Array:
        if self._closed:
            raise closed_error("null")
        _wait(self._latency_s[part])
        tags = x.reshape(len(x), -1)[:, 0]
        if part == POLICY:
            rows = np.abs(tags).astype(np.int64) % len(self._masks)
            return np.where(self._masks[rows], KEPT, DROPPED).astype(np.float32)
        out = np.empty((len(x), *self._outputs[part]), np.float32)
        out[:] = (tags + np.float32(self._steps[part])).reshape(-1, *[1] * len(self._outputs[part]))
        return out

    def run_path(self, parts: Sequence[str], x: Array) -> Array:
        for part in parts:
            x = self.run(part, x)
        return x

    def in_fork(self) -> NullSession:
        """See :meth:`bdexport.backends.base.ForkingSession.in_fork`."""
        return self

    def close(self) -> None:
        self._closed = True


def _step(part: str, num_blocks: int) -> int:
    if part == FULL:
        return num_blocks * (num_blocks + 1) // 2
    kind, _, index = part.partition("_")
    return int(index) + 1 if kind == "block" else 0


def _mask_table(texts: Sequence[str] | None, num_blocks: int) -> Masks:
    """Without declared masks: every block, every second one, none."""
    if texts is None:
        texts = ["1" * num_blocks, ("10" * num_blocks)[:num_blocks], "0" * num_blocks]
    return np.stack([mask_from_text(text, num_blocks) for text in texts])


def _wait(seconds: float) -> None:
    if seconds > 0:  # busy, as a kernel is: sleep() rounds up to the scheduler's tick
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


def _read_engine(path: Readable, part: str) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes())
        if data["schema"] != SCHEMA or data["part"] != part or not 0 <= data["latency_ms"] <= MAX_LATENCY_MS:
            raise MalformedError("not this part's declaration")
        if data["masks"] is not None and not (data["masks"] and all(isinstance(mask, str) for mask in data["masks"])):
            raise MalformedError("masks must be a list of texts")
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        raise BackendError(f"{part} [null]: {path} is no engine ({why(error)})", remedy="rebuild the bundle") from error
    return dict(data)
