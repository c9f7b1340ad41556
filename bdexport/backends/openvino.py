"""The OpenVINO backend on the CPU, in FP32, BF16 or INT8.

Engine files (:mod:`bdexport.backends.openvino_engine`) hold a part compiled and as it was before: they open fast with
the OpenVINO and on the instruction set that they were built with, and are compiled anew elsewhere.
How engines are run is in :mod:`bdexport.backends.openvino_session`.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bdexport.backends.arrays import chosen_threads, no_device_error
from bdexport.backends.base import Availability, BuildOptions, BuildsWhereItRuns, Misfit, RunOptions
from bdexport.backends.forking import note_pool
from bdexport.backends.onnx_model import Model
from bdexport.backends.onnx_rewrite import conv_from_pad
from bdexport.backends.openvino_common import (
    BF16,
    FP32,
    LEAST_OPENVINO,
    PRECISIONS,
    core,
    import_openvino,
    no_bf16_reason,
    openvino_version,
)
from bdexport.backends.openvino_engine import WEIGHTS, XML, requirements_here, write_engine
from bdexport.backends.openvino_session import OpenVinoSession
from bdexport.errors import BackendError, BuildError
from bdexport.files import scratch_folder
from bdexport.packages import install_line
from bdexport.parts import FULL

if TYPE_CHECKING:
    from bdexport.bundle import Bundle, Manifest
    from bdexport.models.pair import BlockDropNet

ENGINE_VERSION = "openvino-engine"
ENGINE_FORMAT = "2"  # of what is in an engine file; part of every cache key, so raise it when building changes
COMPILED_FOR = "openvino-compiled-for"
FP32_REMEDY = "build with --precision fp32"


class OpenVinoBackend(BuildsWhereItRuns):
    """Builds and opens engines for OpenVINO's CPU plugin."""

    name = "openvino"
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    from_float: tuple[str, ...] = (FP32, BF16)
    engine_suffix = ".openvino"
    computes = True
    fuses = True
    stops_runs = True

    def available(self) -> Availability:
        """Whether openvino can be imported. Its own telemetry is kept out."""
        if importlib.util.find_spec("openvino") is None:
            return Availability(False, "openvino is not installed", install_line("openvino"))
        try:
            import_openvino()
        except ImportError as error:
            return Availability(False, f"openvino cannot be imported: {error}", "reinstall openvino")
        version = openvino_version()
        if tuple(int(number) for number in version.split(".")[:2]) < LEAST_OPENVINO:
            least = ".".join(map(str, LEAST_OPENVINO))
            return Availability(False, f"openvino {version} is older than {least}", install_line("openvino"))
        return Availability(True, f"openvino is installed; bf16: {no_bf16_reason() or 'yes'}")

    def versions(self) -> Mapping[str, str]:
        """The release of OpenVINO, the format of an engine file, and what compiled parts need.

        An engine from the cache that was compiled for other instructions would be compiled anew each time it is opened.
        """
        return {"openvino": openvino_version(), ENGINE_VERSION: ENGINE_FORMAT, COMPILED_FOR: requirements_here()}

    def fingerprint(self) -> str:
        """The processor family: engines can be compiled anew anywhere in it, and are verified on one of it."""
        return platform.machine()

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        """Convert and compile the part. Raises BuildError naming it, also for BF16 where there are no units for it."""
        if options.precision not in self.precisions:
            expected = ", ".join(self.precisions)
            raise BuildError(f"{part} [openvino]: precision", got=options.precision, expected=expected)
        if options.precision == BF16 and (reason := no_bf16_reason()):
            raise BuildError(f"{part} [openvino]: bf16 is not available here ({reason})", remedy=FP32_REMEDY)
        try:
            self._convert(part, graph, engine, options.precision)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise BuildError(f"{part} [openvino]: cannot build from {graph} ({reason})") from error

    def _convert(self, part: str, graph: Path, engine: Path, precision: str) -> None:
        source = Model(graph.read_bytes())
        # OpenVINO runs strided slices and padding by reference kernels, in NCHW.
        conv_from_pad(source)
        model = core().read_model(source.to_bytes())
        for number, operation in enumerate(model.get_ordered_ops()):  # names count on through a process otherwise
            operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
        with scratch_folder(engine) as folder:
            xml, weights = folder / XML, folder / WEIGHTS
            import_openvino().serialize(model, str(xml), str(weights))
            members = {XML: xml.read_bytes(), WEIGHTS: weights.read_bytes()}
        write_engine(part, engine, model, precision, members)

    def open(self, bundle: Bundle, options: RunOptions) -> OpenVinoSession:
        """Load the engines. Raises BackendError for another device, format or processor than they can run on."""
        if options.device != "cpu":
            raise no_device_error(self.name, options.device, "cpu (this backend has no other device yet)")
        manifest = bundle.manifest
        if (misfit := self.misfit(manifest)) is not None and misfit.refused:
            raise misfit.error(bundle)
        if manifest.precision == BF16 and (reason := no_bf16_reason()):
            raise BackendError(f"{bundle.path} [openvino]: bf16 is not available here ({reason})", remedy=FP32_REMEDY)
        threads, note = chosen_threads(options.threads, manifest.parts[FULL].flops)
        note_pool("OpenVINO", threads, one_waits_too=True)  # measured: even an import for one thread never ends
        files = {part: bundle.engine_file(part) for part in manifest.parts}
        return OpenVinoSession(manifest, files, threads, note, options.fused, options.timeout_s)

    def misfit(self, manifest: Manifest) -> Misfit | None:
        """See :meth:`bdexport.backends.base.RebuildingBackend.misfit`.

        Engines that were compiled for another release or instruction set are compiled again whenever they are opened.
        """
        form = manifest.versions.get(ENGINE_VERSION)
        if manifest.fingerprint != self.fingerprint():
            return Misfit("engines are for another processor", manifest.fingerprint, self.fingerprint())
        if form != ENGINE_FORMAT:
            return Misfit("engines are in another form", str(form), ENGINE_FORMAT)
        compiled = manifest.versions.get(COMPILED_FOR)
        if compiled != requirements_here():
            here, version = requirements_here(), manifest.versions.get("openvino")
            install = None if version in (None, openvino_version()) else f"pip install openvino=={version}"
            return Misfit("engines were compiled for another OpenVINO", str(compiled), here, install, refused=False)
        return None
