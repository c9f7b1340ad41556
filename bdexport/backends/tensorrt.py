"""The backends ``tensorrt`` (TensorRT 10 and 11) and ``tensorrt-rtx`` (TensorRT for RTX): two names, one code.

TensorRT builds on the GPU that its engines are for. TensorRT for RTX builds on any machine, for the GPUs it is told,
and compiles kernels where the engine runs. How engines are run is in :mod:`bdexport.backends.tensorrt_session`.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdexport.backends.base import Availability, BuildOptions, RunOptions
from bdexport.backends.tensorrt_common import RTX, TENSORRT, Api, Flavour, load_api
from bdexport.errors import BackendError

if TYPE_CHECKING:
    from bdexport.bundle import Bundle
    from bdexport.models.pair import BlockDropNet

FP8 = "fp8"
ENGINE_FORMAT = "1"  # of what is in an engine file; part of every cache key, so raise it when building changes


@dataclass(frozen=True)
class Gpu:
    """The GPU that engines are built on and for."""

    name: str
    compute_capability: str


class TensorRTBackend:
    """Builds and opens engines for TensorRT."""

    name = "tensorrt"
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", FP8)  # all of them are in the graph
    engine_suffix = ".engine"
    computes = True
    default_device = "cuda"
    flavour: Flavour = TENSORRT

    def available(self) -> Availability:
        """Whether TensorRT can be imported, and a GPU and a driver are there."""
        installed = self._installed()
        if not installed.ok:
            return installed
        try:
            gpu = _gpu()
        except BackendError as error:
            return Availability(False, f"{installed.reason} is installed; {error.reason}", error.remedy)
        return Availability(True, f"{installed.reason} on {gpu.name}, compute capability {gpu.compute_capability}")

    def can_build(self) -> Availability:
        """TensorRT times kernels on the GPU that they are for; TensorRT for RTX builds anywhere."""
        return self._installed() if self.flavour.rtx else self.available()

    def can_run(self, options: BuildOptions) -> Availability:
        """Whether they are for the GPU that is here: TensorRT for RTX builds for others as well, and not for all."""
        here, targets = self.available(), options.tensorrt.compute_capabilities
        if not here.ok:
            return here
        unknown = self._unknown_gpu()
        if unknown is not None:
            return Availability(False, unknown)
        if not targets or _gpu().compute_capability in targets:
            return here
        gpu = _gpu()
        reason = f"they are for compute capability {', '.join(targets)}; {gpu.name} has {gpu.compute_capability}"
        return Availability(False, reason)

    def _unknown_gpu(self) -> str | None:
        """Why no engine of this TensorRT for RTX runs on the GPU that is here; None where one may."""
        from bdexport.backends.tensorrt_build import compute_capabilities

        if not self.flavour.rtx:
            return None
        gpu, known = _gpu(), compute_capabilities(self._api())
        if gpu.compute_capability in known:
            return None
        return (
            f"{self.flavour.title} {self._api().version} has no compute capability {gpu.compute_capability}, which "
            f"{gpu.name} has; it knows {', '.join(known)}"
        )

    def _installed(self) -> Availability:
        flavour = self.flavour
        if importlib.util.find_spec(flavour.module) is None:
            return Availability(False, f"{flavour.module} is not installed", flavour.install)
        try:
            api = load_api(flavour)
        except BackendError as error:
            return Availability(False, error.reason, error.remedy)
        except Exception as error:  # its libraries are loaded by hand: what is missing comes as one exception or other
            reason = " ".join(str(error).split())
            return Availability(False, f"{flavour.module} cannot be imported: {reason}", flavour.install)
        return Availability(True, f"{flavour.title} {api.version}")

    def versions(self) -> Mapping[str, str]:
        """The exact version, which engines are bound to, and the format of an engine file."""
        return {self.name: self._api().version, f"{self.name}-engine": ENGINE_FORMAT}

    def fingerprint(self) -> str:
        """The GPU model for TensorRT; for TensorRT for RTX the platform alone, since no GPU takes part."""
        return f"{platform.system()} {platform.machine()}".lower() if self.flavour.rtx else _gpu().name

    def resolved(self, options: BuildOptions) -> BuildOptions:
        """The largest batch and, for TensorRT, the GPU filled in; in FP8, the targets that have it.

        Raises UsageError as ``check_settings``, and for FP8 on a GPU without it.
        """
        from bdexport.backends.tensorrt_build import check_settings, with_fp8_targets

        settings = options.tensorrt
        most = settings.max_batch if options.max_batch is None else options.max_batch
        if not self.flavour.rtx and settings.compute_capabilities == (_gpu().compute_capability,):
            settings = replace(settings, compute_capabilities=())  # resolved before
        check_settings(self._api(), settings, most)
        if not self.flavour.rtx:
            settings = replace(settings, compute_capabilities=(_gpu().compute_capability,))
        if options.precision == FP8:
            settings = with_fp8_targets(self._api(), settings)
        return replace(options, max_batch=most, tensorrt=settings)

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        """Build the part; what it computes in is what the graph says. Raises BuildError naming the part."""
        from bdexport.backends.tensorrt_build import build_engine

        here = self.available()
        gpu = _gpu().name if here.ok else None
        build_engine(self._api(), part, graph, engine, self.resolved(options), gpu, None if here.ok else here.reason)

    def open(self, bundle: Bundle, options: RunOptions) -> Any:
        """Load the engines on a GPU. Raises BackendError naming the part, both sides and the rebuild line."""
        from bdexport.backends.tensorrt_session import open_session

        unknown = self._unknown_gpu() if self.available().ok else None
        if unknown is not None:
            remedy = "build the bundle with --backend tensorrt, onnxruntime or torch for this GPU"
            raise BackendError(f"{bundle.path} [{self.name}]: {unknown}", remedy=remedy)
        return open_session(self._api(), bundle, options)

    def _api(self) -> Api:
        return load_api(self.flavour)


class TensorRTForRTXBackend(TensorRTBackend):
    """Builds and opens engines for TensorRT for RTX."""

    name = "tensorrt-rtx"
    flavour = RTX


@lru_cache(maxsize=1)
def _gpu() -> Gpu:
    """The first GPU. Raises BackendError where there is none, or no driver or no binding to reach it."""
    from bdexport.cuda import open_cuda

    with closing(open_cuda()) as cuda:
        major, minor = cuda.compute_capability()
        return Gpu(cuda.device_name(), f"{major}.{minor}")
