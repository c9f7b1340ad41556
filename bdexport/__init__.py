"""bdexport: run per image only the residual blocks that a BlockDrop policy keeps.

From Python, a bundle that ``bdexport build`` wrote is loaded and called::

    import bdexport

    orchestrator = bdexport.load("engines/resnet32")
    result = orchestrator(images)  # uint8 (N, H, W, 3), or float32 (N, 3, H, W) already preprocessed
    result.logits, result.masks, result.blocks_used, result.timings

Importing this package imports neither torch nor onnx; ``load`` needs numpy and the bundle's backend only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdexport.runtime import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on use, so that `bdexport --help` and `bdexport.__version__` do not wait for numpy.
    if name == "load":
        from bdexport.runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
