"""Device and pinned memory that is kept for the next use: nothing is allocated while a warm session runs.

A block goes back to its arena when its last owner lets go of it, and may be handed out again while work that uses it
is still queued: that is right as long as everything that uses the arena is queued on one stream. The last block given
back is the first handed out, so a call that repeats gets the same addresses.
"""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np
from numpy.typing import NDArray

from bdexport.cuda.base import Cuda, DeviceBuffer, Event, PinnedBuffer, Stream
from bdexport.errors import BackendError

WAITING_BYTES = 1 << 20  # pinned memory of one size that may wait for its copies before the host waits for the oldest
ALIGNMENT = 256  # bytes; what allocations have and TensorRT asks of addresses


def block_bytes(nbytes: int) -> int:
    """The size that is allocated for ``nbytes``: 256 x (1, 2, 3, 4, 6, 8, 12, ..), at most half too much."""
    size = ALIGNMENT
    while size < nbytes:
        if size + size // 2 >= nbytes and size > ALIGNMENT:
            return size + size // 2
        size *= 2
    return size


class Block:
    """Device memory of an :class:`Arena`; goes back to it when nothing refers to the block any more."""

    __slots__ = ("__weakref__", "_arena", "_buffer", "pointer")

    def __init__(self, arena: Arena, buffer: DeviceBuffer) -> None:
        self._arena, self._buffer, self.pointer = arena, buffer, buffer.pointer

    @property
    def nbytes(self) -> int:
        """Size in bytes, which may be more than was asked for."""
        return self._buffer.nbytes

    def __del__(self) -> None:
        self._arena.give_back(self._buffer)


class Arena:
    """Device memory in blocks. ``take`` and giving back may happen in any thread."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        # Only list.append and list.pop, each atomic: blocks are given back by whatever thread drops them last.
        self._free: defaultdict[int, list[DeviceBuffer]] = defaultdict(list)
        self._closed = False
        self.allocated_bytes = 0

    def take(self, nbytes: int) -> Block:
        """Memory of at least ``nbytes``, not cleared. Raises BackendError when the device has no more."""
        size = block_bytes(nbytes)
        try:
            return Block(self, self._free[size].pop())
        except IndexError:
            return Block(self, self._allocate(size))

    def give_back(self, buffer: DeviceBuffer) -> None:
        """For :class:`Block`; after :meth:`close` the memory is freed at once."""
        if self._closed:
            buffer.free()
        else:
            self._free[buffer.nbytes].append(buffer)

    def trim(self) -> None:
        """Free what nobody uses. The driver waits for queued work when it frees memory."""
        for buffers in list(self._free.values()):
            while buffers:
                buffer = buffers.pop()
                self.allocated_bytes -= buffer.nbytes
                buffer.free()

    def close(self) -> None:
        """Free what nobody uses, and every other block as soon as its owner lets go of it."""
        self._closed = True
        self.trim()

    def _allocate(self, size: int) -> DeviceBuffer:
        try:
            buffer = self._cuda.allocate(size)
        except BackendError:
            self.trim()
            buffer = self._cuda.allocate(size)
        self.allocated_bytes += size
        return buffer


class Staging:
    """Pinned host memory in blocks, each with the event behind the last copy that uses it, the oldest first."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._free: defaultdict[int, deque[tuple[PinnedBuffer, Event]]] = defaultdict(deque)
        self._closed = False

    def take(self, nbytes: int) -> StagingBlock:
        """Memory of at least ``nbytes`` that no queued copy uses any more.

        A copy is queued behind all work before it, so small blocks are rather added than waited for: the rows of a
        batch of several masks are copied for every residual block.
        """
        size = block_bytes(nbytes)
        free = self._free[size]
        if free and ((len(free) + 1) * size > WAITING_BYTES or free[0][1].reached()):
            buffer, event = free.popleft()
            event.synchronize()
        else:
            buffer, event = self._cuda.pinned(size), self._cuda.event()
        return StagingBlock(self, buffer, event, nbytes)

    def give_back(self, buffer: PinnedBuffer, event: Event) -> None:
        """For :class:`StagingBlock`."""
        self._free[len(buffer.array)].append((buffer, event))

    def close(self) -> None:
        """Free what nobody uses, and the rest as its users let go of it. No copy may be queued."""
        self._closed = True
        for blocks in list(self._free.values()):
            while blocks:
                buffer, event = blocks.pop()
                event.close()
                buffer.free()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed


class StagingBlock:
    """Pinned memory for one copy. Dropped instead of released, as after a failure, it is freed."""

    def __init__(self, staging: Staging, buffer: PinnedBuffer, event: Event, nbytes: int) -> None:
        self._staging, self._event = staging, event
        self._buffer: PinnedBuffer | None = buffer
        self.bytes: NDArray[np.uint8] = buffer.array[:nbytes]

    def release(self, stream: Stream) -> None:
        """Give the memory back; it is handed out again once ``stream`` has passed this point."""
        buffer = self._buffer
        if buffer is not None and not self._staging.closed:
            self._event.record(stream)
            self._buffer = None
            self._staging.give_back(buffer, self._event)

    def __del__(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._event.close()
            buffer.free()
