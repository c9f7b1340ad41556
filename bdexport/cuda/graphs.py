"""CUDA graphs by cuda-bindings, on raw stream handles: they serve streams of either binding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bdexport.cuda.base import Stream
from bdexport.cuda.driver_api import checked, driver_api


class Captured:
    """An instantiated graph; see :class:`bdexport.cuda.base.Graph`."""

    def __init__(self, api: Any, executable: Any) -> None:
        self._api, self._executable = api, executable

    def launch(self, stream: Stream) -> None:
        checked(self._api, self._api.cuGraphLaunch(self._executable, stream.handle), "graph launch")

    def close(self) -> None:
        executable, self._executable = self._executable, None
        if executable is not None:
            self._api.cuGraphExecDestroy(executable)


class Capturing:
    """See :class:`bdexport.cuda.base.Capture`."""

    graph: Captured


@contextmanager
def capture(stream: Stream) -> Iterator[Capturing]:
    """Capture what the block queues on ``stream``; the caller has made the context current.

    Calls of this thread that cannot be captured fail; other threads go on as before. The driver's memory for the graph
    is made ready at once, so that no launch pays for it.
    """
    api = driver_api()
    mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    checked(api, api.cuStreamBeginCapture(stream.handle, mode), "capture")
    capturing = Capturing()
    try:
        yield capturing
    except BaseException:
        _, graph = api.cuStreamEndCapture(stream.handle)  # leaves the stream usable; its own error says less
        _destroy(api, graph)
        raise
    graph = checked(api, api.cuStreamEndCapture(stream.handle), "capture")
    try:
        executable = checked(api, api.cuGraphInstantiate(graph, 0), "graph instantiation")
    finally:
        _destroy(api, graph)
    capturing.graph = Captured(api, executable)
    checked(api, api.cuGraphUpload(executable, stream.handle), "graph upload")


def _destroy(api: Any, graph: Any) -> None:
    if graph is not None and int(graph) != 0:
        api.cuGraphDestroy(graph)
