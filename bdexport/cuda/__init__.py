"""CUDA through PyCUDA or cuda-python: memory, streams, events, graphs and two small kernels. Imported on use only."""

from bdexport.cuda.base import Capture, Cuda, DeviceBuffer, Event, Graph, PinnedBuffer, Stream

__all__ = ["Capture", "Cuda", "DeviceBuffer", "Event", "Graph", "PinnedBuffer", "Stream"]
