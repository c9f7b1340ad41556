"""A device session on the double, with real parts: what its tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from bundles import make_bundle
from cuda_double import CudaDouble, of, read
from tiny import tiny_model

from bdexport.backends.device_session import DeviceSession
from bdexport.bundle import Bundle, PartEntry
from bdexport.cuda.base import Stream
from bdexport.errors import BackendError
from bdexport.models.pair import BlockDropNet
from bdexport.partition import part_module

SCRATCH = 1000


class ModuleEngine:
    """A part as torch computes it, behind the engine protocol; ``fails``: raise instead of queueing."""

    def __init__(self, part: str, module: torch.nn.Module, entry: PartEntry) -> None:
        self.part, self._module, self._entry = part, module, entry
        self.scratch_bytes, self.scratch = SCRATCH, 0
        self.fails = self.closed = False
        self.addresses: list[tuple[int, int]] = []

    def use_scratch(self, pointer: int) -> None:
        self.scratch = pointer

    def enqueue(self, source: int, target: int, batch: int, stream: Stream) -> None:
        if self.fails:
            raise BackendError(f"{self.part} [double]: failed")
        assert source % 256 == target % 256 == 0
        self.addresses.append((source, target))

        def work() -> None:
            x = torch.from_numpy(read(source, (batch, *self._entry.input.shape)).copy())
            with torch.no_grad():
                read(target, (batch, *self._entry.output.shape))[...] = self._module(x).numpy()

        of(stream).submit(work)

    def close(self) -> None:
        self.closed = True


class DeviceCase:
    """A model, its bundle, and sessions on doubles."""

    def __init__(self, folder: Path) -> None:
        self.model: BlockDropNet = tiny_model()
        self.bundle: Bundle = make_bundle(folder, self.model, "torch", max_batch=9)

    def engines(self) -> dict[str, ModuleEngine]:
        parts = self.bundle.manifest.parts
        return {part: ModuleEngine(part, part_module(self.model, part), entry) for part, entry in parts.items()}

    def session(
        self, cuda: CudaDouble, engines: dict[str, ModuleEngine] | None = None, **more: object
    ) -> DeviceSession:
        make: Callable[..., DeviceSession] = DeviceSession
        return make("double", self.bundle.manifest, engines or self.engines(), cuda, **more)
