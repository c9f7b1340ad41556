"""The run-time half: decide, group, run the kept blocks, classify. Imports neither torch nor onnx."""

from bdexport.runtime.orchestrator import Orchestrator, Result, load

__all__ = ["Orchestrator", "Result", "load"]
