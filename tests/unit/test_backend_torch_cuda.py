"""On which stream the torch backend waits for which, where no GPU is: torch's streams are stand-ins that write it down.

Values, and the same with real streams: tests/gpu.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bdexport.backends import torch_cuda
from bdexport.backends.torch_cuda import TorchCudaSession
from bdexport.parts import POLICY

SHAPE = (3, 4, 4)


class StreamDouble:
    """``log``: what all streams did, in order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: StreamDouble) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class Place:
    """A session without its engines, the caller's stream, and torch's notion of the current one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.caller, own = StreamDouble("caller", self.log), StreamDouble("session", self.log)
        self._current = self.caller
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self._current)
        patch.setattr(torch.cuda, "stream", self._entered)
        patch.setattr(torch_cuda, "_adopted", self._adopted)
        self.session = TorchCudaSession.__new__(TorchCudaSession)
        parts = {POLICY: SimpleNamespace(input=SimpleNamespace(shape=SHAPE))}
        vars(self.session).update(
            _manifest=SimpleNamespace(parts=parts),
            _device=torch.device("cpu"),
            _stream=own,
            _lock=threading.RLock(),
            _closed=False,
        )

    @contextmanager
    def _entered(self, stream: StreamDouble) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def _adopted(self, array: Any) -> torch.Tensor:
        self.log.append(f"adopted on {self._current.name}")
        return torch.zeros(2, *SHAPE)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(monkeypatch)


class OnTheGpu:
    """What says that it lies in a GPU's memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_images_are_read_after_what_the_caller_has_queued(place: Place) -> None:
    """Oracle: DLPack of torch's tensors orders them behind torch's current stream only: the session's, there."""
    place.session.put(POLICY, OnTheGpu())
    assert place.log == ["session waits for caller", "adopted on session"]


def test_logits_are_ready_for_the_callers_stream(place: Place) -> None:
    """Oracle: the caller's stream waits, and the memory is marked as used there; torch's DLPack does neither."""
    recorded: list[StreamDouble] = []
    tensor: Any = SimpleNamespace(record_stream=recorded.append)
    assert place.session.export(tensor) is tensor
    assert place.log == ["caller waits for session"]
    assert recorded == [place.caller]


def test_arrays_that_cannot_be_written_come_in(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the values; torch warns, and warnings are errors here, of memory that it must not write."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    values = np.ones((2, *SHAPE), np.float32)
    values.flags.writeable = False
    assert np.array_equal(place.session.put(POLICY, values).numpy(), values)
