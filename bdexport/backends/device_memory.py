"""Tensors on a GPU, and the memory at fixed addresses that captured graphs read and write."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from bdexport.cuda.arena import Arena, Block

if TYPE_CHECKING:
    from bdexport.bundle import Manifest

FLOAT = np.dtype(np.float32)


class DeviceTensor:
    """float32 ``shape`` (batch first) at ``pointer``; keeps its memory, or whose memory it is, alive."""

    __slots__ = ("__weakref__", "memory", "pointer", "shape")

    def __init__(self, pointer: int, shape: tuple[int, ...], memory: object) -> None:
        self.pointer, self.shape, self.memory = pointer, shape, memory

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """float32."""
        return FLOAT

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape[1:]) * FLOAT.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the batch."""
        return self.shape[0] * self.row_bytes


class StaticBlock:
    """Memory that graphs read or write. ``holder()``: the tensor, if it is still in use, that lies there now."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.holder: Any = nobody

    @property
    def unused(self) -> bool:
        """Whether nobody's tensor lies there."""
        return self.holder() is None

    def hold(self, shape: tuple[int, ...]) -> DeviceTensor:
        """A tensor on this memory."""
        tensor = DeviceTensor(self.block.pointer, shape, self)
        self.holder = weakref.ref(tensor)
        return tensor


class StaticBuffers:
    """What graphs of batches up to ``capacity`` share: an input per shape (the policy's, stem's and full's are one),
    two sides for activations, an output per last part.
    """

    def __init__(self, arena: Arena, manifest: Manifest, capacity: int) -> None:
        self._arena, self._manifest, self.capacity = arena, manifest, capacity
        largest = max(math.prod(entry.output.shape) for entry in manifest.parts.values())
        self.inputs: dict[tuple[int, ...], StaticBlock] = {}
        self.sides = (arena.take(self._bytes(largest)), arena.take(self._bytes(largest)))
        self._outputs: dict[str, StaticBlock] = {}

    def input(self, part: str) -> StaticBlock:
        """Where a path that begins with ``part`` reads."""
        shape = self._manifest.parts[part].input.shape
        if shape not in self.inputs:
            self.inputs[shape] = StaticBlock(self._arena.take(self._bytes(math.prod(shape))))
        return self.inputs[shape]

    def output(self, part: str) -> StaticBlock:
        """Where a path that ends with ``part`` leaves its result."""
        if part not in self._outputs:
            size = math.prod(self._manifest.parts[part].output.shape)
            self._outputs[part] = StaticBlock(self._arena.take(self._bytes(size)))
        return self._outputs[part]

    def _bytes(self, values: int) -> int:
        return self.capacity * values * FLOAT.itemsize


def nobody() -> None:
    """Like a weak reference to a tensor that is gone."""
