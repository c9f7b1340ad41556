"""The ONNX Runtime backend: on the CPU, the embedded default; on a GPU see :mod:`bdexport.backends.onnxruntime_cuda`.

Engines are optimised offline (:mod:`bdexport.backends.onnxruntime_build`) and belong to one version of ONNX Runtime and
one kind of processor; how they are run is in :mod:`bdexport.backends.onnxruntime_session`.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bdexport.backends.arrays import chosen_threads, no_device_error
from bdexport.backends.base import Availability, BuildOptions, BuildsWhereItRuns, Misfit, RunOptions, Session
from bdexport.backends.onnxruntime_common import NO_CAPTURE, channel_block, import_onnxruntime
from bdexport.backends.onnxruntime_session import OnnxRuntimeSession
from bdexport.cuda import cuda_ordinal
from bdexport.errors import BuildError
from bdexport.packages import install_line
from bdexport.parts import FULL

if TYPE_CHECKING:
    from bdexport.bundle import Bundle, Manifest
    from bdexport.models.pair import BlockDropNet

INT8 = "int8"  # Q/DQ in the graph; its convolutions of 8-bit integers are ONNX Runtime's own fusion of them
ENGINE_FORMAT = "3"  # of what is in an engine file; part of every cache key, so raise it when building changes


class OnnxRuntimeBackend(BuildsWhereItRuns):
    """Builds and opens engines for ONNX Runtime's CPU execution provider."""

    name = "onnxruntime"
    precisions: tuple[str, ...] = ("fp32", INT8)
    from_float: tuple[str, ...] = ("fp32",)
    engine_suffix = ".onnx"
    computes = True
    fuses = True
    stops_runs = True
    no_capture = NO_CAPTURE

    def available(self) -> Availability:
        """Whether onnxruntime can be imported."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed", install_line("cpu"))
        try:
            import_onnxruntime()
        except ImportError as error:
            return Availability(False, f"onnxruntime cannot be imported: {error}", "reinstall onnxruntime")
        return Availability(True, "onnxruntime is installed")

    def versions(self) -> Mapping[str, str]:
        """Optimised graphs belong to one version of ONNX Runtime."""
        return {"onnxruntime": import_onnxruntime().__version__, "onnxruntime-engine": ENGINE_FORMAT}

    def fingerprint(self) -> str:
        """The processor family and the channel block of its blocked layout; engines hold nothing else of a machine."""
        block = channel_block()
        return f"{platform.machine()} {f'nchwc{block}' if block > 1 else 'nchw'}"

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        """Optimise the part for this processor. Raises BuildError naming the part."""
        from bdexport.backends.onnxruntime_build import build_engine

        if options.precision not in self.precisions:
            expected = ", ".join(self.precisions)
            raise BuildError(f"{part} [onnxruntime]: precision", got=options.precision, expected=expected)
        # Integer kernels have no blocked layout: between float parts in it, every boundary would be converted twice.
        build_engine(part, graph, engine, 1 if options.precision == INT8 else channel_block())

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        """Load the engines; on a GPU, the graphs that they were built from.

        Raises BackendError for another machine, version or device than they are built for.
        """
        ordinal = cuda_ordinal(options.device)
        if ordinal is not None:
            from bdexport.backends.onnxruntime_cuda import open_on_cuda

            return open_on_cuda(bundle, options.device, ordinal, options.stream)
        if options.device != "cpu":
            raise no_device_error(self.name, options.device, "cpu or cuda")
        if (misfit := self.misfit(bundle.manifest)) is not None:
            raise misfit.error(bundle)
        threads, note = chosen_threads(options.threads, bundle.manifest.parts[FULL].flops)
        files = {part: bundle.engine_file(part) for part in bundle.manifest.parts}
        return OnnxRuntimeSession(
            bundle.manifest, files, threads, note, fused=options.fused, timeout_s=options.timeout_s
        )

    def misfit(self, manifest: Manifest) -> Misfit | None:
        """See :meth:`bdexport.backends.base.RebuildingBackend.misfit`.

        Engines of another channel block would run and give wrong numbers, so that this is never only a warning.
        """
        if manifest.fingerprint != self.fingerprint():
            return Misfit("engines are for another processor", manifest.fingerprint, self.fingerprint())
        for name, here in self.versions().items():
            built = manifest.versions.get(name)
            if built != here:
                install = f"pip install onnxruntime=={built}" if name == "onnxruntime" and built is not None else None
                return Misfit(f"engines are for another version of {name}", str(built), here, install)
        return None


def open_graphs(bundle: Bundle) -> OnnxRuntimeSession:
    """The bundle's graphs as they are, every optimisation off, one thread: the reference without torch."""
    graphs = {part: bundle.graph_file(part) for part in bundle.manifest.parts}
    return OnnxRuntimeSession(bundle.manifest, graphs, 1, "graphs as exported, not optimised", linked=False)
