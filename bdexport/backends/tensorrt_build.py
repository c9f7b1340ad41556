"""ONNX graph -> TensorRT engine. Networks are strongly typed: the graph says in what each layer computes.

Nothing here needs a GPU with TensorRT for RTX; TensorRT itself times kernels on one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdexport.backends.base import BuildOptions
from bdexport.backends.tensorrt_common import Api, EngineDescription, LogLines, write_engine
from bdexport.config import TensorRTConfig
from bdexport.errors import BuildError, OutputError, UsageError
from bdexport.files import UntrustedError, check_trusted, make_cache, write_bytes

HARDWARE_LEVELS = {"ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
OPTIMIZATION_LEVELS = range(6)
FIRST_WITH_FP8 = 8, 9
_timing_lock = threading.Lock()


def build_engine(
    api: Api, part: str, graph: Path, engine: Path, options: BuildOptions, gpu: str | None, no_layers: str | None
) -> None:
    """Write the engine of one part. ``gpu``: the model that is here; ``no_layers``: why engines cannot be loaded here.

    Raises :class:`BuildError` naming the part, for a graph that TensorRT refuses also the node and its operator, and
    quoting TensorRT's log.
    """
    settings = options.tensorrt
    plan = _plan(api, part, graph, options, gpu)
    layers, reason = (None, no_layers) if no_layers is not None else _layers(api, plan)
    description = EngineDescription(
        part=part,
        flavour=api.flavour.name,
        version=api.version,
        gpu=gpu,
        compute_capabilities=settings.compute_capabilities,
        batches=_batches(options),
        version_compatible=settings.version_compatible,
        hardware_compatible=settings.hardware_compatible,
        layers=reason,
    )
    write_engine(engine, description, plan, layers)


def _plan(api: Api, part: str, graph: Path, options: BuildOptions, gpu: str | None) -> bytes:
    with api.log.book.capture() as said:
        try:
            builder = api.module.Builder(api.log)
        except TypeError as error:  # "factory function returned nullptr"
            raise _error(api, part, "nothing can be built on this machine", said) from error
        # The parser owns the weights that the network points to: it must live until the engine is built.
        network, _parser = _network(api, builder, part, graph, said)
        config = builder.create_builder_config()
        _apply(api, config, options.tensorrt)
        _add_profile(builder, network, config, part, api, _batches(options), said)
        monitor = _monitor(api, part, options.progress)
        config.progress_monitor = monitor
        cache = None if api.flavour.rtx else _timing_file(api, options.cache_folder, gpu)
        if cache is not None:
            _use_timing_cache(config, cache)
        built = builder.build_serialized_network(network, config)
        if built is None:
            if monitor.stopped:
                raise BuildError(f"{part} [{api.flavour.name}]: the build was stopped")
            raise _error(api, part, "cannot be built", said)
        if cache is not None:
            _keep_timings(config, cache)
        return bytes(built)


def _error(api: Api, part: str, what: str, said: LogLines) -> BuildError:
    return BuildError(f"{part} [{api.flavour.name}]: {what}; {api.flavour.title} {api.version} said: {said.quote()}")


# ---- network and profile ------------------------------------------------------------------------------------------


def _network(api: Api, builder: Any, part: str, graph: Path, said: LogLines) -> tuple[Any, Any]:
    trt = api.module
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 knows no other kind
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, api.log)
    try:
        data = graph.read_bytes()
    except OSError as error:
        raise BuildError(f"{part} [{api.flavour.name}]: {graph} cannot be read ({error.strerror})") from error
    if not parser.parse(data):
        raise _error(api, part, _parser_errors(parser) or f"{graph} cannot be parsed", said)
    if (network.num_inputs, network.num_outputs) != (1, 1):
        got = f"{network.num_inputs} inputs, {network.num_outputs} outputs"
        raise BuildError(f"{part} [{api.flavour.name}]: {graph}", got=got, expected="one of each")
    return network, parser


def _parser_errors(parser: Any) -> str:
    """Each refused node with its name, its operator and the parser's reason."""
    texts = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        code = getattr(error.code(), "name", error.code())
        where = f"node {error.node_name() or error.node()} ({error.node_operator()}): " if error.node() >= 0 else ""
        reason = " ".join(error.desc().split())
        texts.append(f"{where}{code}" + ("" if reason in ("", "false") else f", {reason}"))
    return "; ".join(texts)


def _batches(options: BuildOptions) -> tuple[int, int, int]:
    assert options.max_batch is not None, "resolved() fills it in"
    return options.tensorrt.min_batch, options.tensorrt.opt_batch, options.max_batch


def _add_profile(
    builder: Any, network: Any, config: Any, part: str, api: Api, batches: tuple[int, int, int], said: LogLines
) -> None:
    x = network.get_input(0)
    free, *image = tuple(x.shape)
    if free != -1 or -1 in image:
        name = api.flavour.name
        raise BuildError(f"{part} [{name}]: input shape", got=tuple(x.shape), expected="a free batch and no other")
    profile = builder.create_optimization_profile()
    profile.set_shape(x.name, *((batch, *image) for batch in batches))
    if config.add_optimization_profile(profile) < 0:
        raise _error(api, part, f"batches {batches} are refused", said)


# ---- settings -----------------------------------------------------------------------------------------------------


def check_settings(api: Api, settings: TensorRTConfig, max_batch: int) -> None:
    """Raises :class:`UsageError` for a setting that is out of range or that this TensorRT has no use for."""
    name = f"backend {api.flavour.name}"
    batches = (settings.min_batch, settings.opt_batch, max_batch)
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        expected = "1 <= --min-batch <= --opt-batch <= --max-batch"
        raise UsageError(f"{name}: batches", got=", ".join(map(str, batches)), expected=expected)
    if settings.workspace_mib is not None and settings.workspace_mib < 1:
        raise UsageError(f"{name}: --workspace-mib", got=settings.workspace_mib, expected="at least 1")
    if settings.optimization_level is not None and settings.optimization_level not in OPTIMIZATION_LEVELS:
        expected = f"{OPTIMIZATION_LEVELS.start}..{OPTIMIZATION_LEVELS.stop - 1}"
        raise UsageError(f"{name}: --optimization-level", got=settings.optimization_level, expected=expected)
    _check_targets(api, settings, name)


def _check_targets(api: Api, settings: TensorRTConfig, name: str) -> None:
    if settings.hardware_compatible is not None:
        if api.flavour.rtx:
            remedy = "name the GPUs with --compute-capability instead"
            raise UsageError(f"{name}: --hardware-compatible has no effect", remedy=remedy)
        levels = api.module.HardwareCompatibilityLevel.__members__
        known = [text for text, level in HARDWARE_LEVELS.items() if level in levels]
        if settings.hardware_compatible not in known:
            expected = f"{' or '.join(known)} (what {api.flavour.title} {api.version} offers)"
            raise UsageError(f"{name}: --hardware-compatible", got=settings.hardware_compatible, expected=expected)
    if settings.compute_capabilities:
        if not api.flavour.rtx:
            remedy = "TensorRT builds for the GPU that is here; tensorrt-rtx builds for others"
            raise UsageError(f"{name}: --compute-capability has no effect", remedy=remedy)
        targets = compute_capabilities(api)
        unknown = [text for text in settings.compute_capabilities if text not in targets]
        if unknown or len(set(settings.compute_capabilities)) != len(settings.compute_capabilities):
            got = ", ".join(unknown or settings.compute_capabilities)
            expected = f"some of {', '.join(targets)}, each once (what {api.flavour.title} {api.version} builds for)"
            raise UsageError(f"{name}: --compute-capability", got=got, expected=expected)


def with_fp8_targets(api: Api, settings: TensorRTConfig) -> TensorRTConfig:
    """``settings`` for FP8, which GPUs have from 8.9 (Ada) on: where none are named, all such targets that there are.

    Raises :class:`UsageError` for a target, or a GPU that engines are built on, without FP8.
    """
    name = api.flavour.name
    if not settings.compute_capabilities:
        return replace(settings, compute_capabilities=tuple(filter(_has_fp8, compute_capabilities(api))))
    without = [text for text in settings.compute_capabilities if not _has_fp8(text)]
    if not without:
        return settings
    option = "--compute-capability" if api.flavour.rtx else "the GPU"
    known = ", ".join(filter(_has_fp8, compute_capabilities(api))) if api.flavour.rtx else "8.9 or newer"
    raise UsageError(
        f"backend {name}: {option} has no FP8",
        got=", ".join(without),
        expected=f"{known} for --precision fp8",
        remedy="build with --precision int8 or fp16 for this GPU",
    )


def _has_fp8(compute_capability: str) -> bool:
    major, minor = map(int, compute_capability.split("."))
    return (major, minor) >= FIRST_WITH_FP8


def compute_capabilities(api: Api) -> dict[str, Any]:
    """What this TensorRT for RTX can be told to build for: "8.9" -> its own constant."""
    found = {}
    for member, value in api.module.ComputeCapability.__members__.items():
        digits = member.removeprefix("SM")
        if digits.isdigit():
            found[f"{digits[:-1]}.{digits[-1]}"] = value
    return found


def _apply(api: Api, config: Any, settings: TensorRTConfig) -> None:
    trt = api.module
    if settings.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0  # everything on the session's stream: parts are small, and share their scratch
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible is not None:
        level = HARDWARE_LEVELS[settings.hardware_compatible]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if api.flavour.rtx and settings.compute_capabilities:
        known = compute_capabilities(api)
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, text in enumerate(settings.compute_capabilities):
            config.set_compute_capability(known[text], index)


# ---- progress -----------------------------------------------------------------------------------------------------


def _monitor(api: Api, part: str, progress: Callable[[str, float], bool] | None) -> Any:
    """TensorRT's phases as one share of the whole; ``.stopped`` once it was asked to stop."""
    shares = _Shares()

    class Monitor(api.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            api.module.IProgressMonitor.__init__(self)
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            shares.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            shares.step(phase_name, step)
            if progress is not None and not progress(part, shares.done()):
                self.stopped = True
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            shares.finish(phase_name)

    return Monitor()


class _Shares:
    """Phases inside steps of phases: what share of the outermost one is done. Called from TensorRT's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int]] = {}  # phase -> parent, number of steps
        self._steps: dict[str, int] = {}
        self._best = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside the current step of its parent."""
        with self._lock:
            self._phases[phase], self._steps[phase] = (parent, max(1, steps)), 0

    def step(self, phase: str, step: int) -> None:
        """Step ``step`` (from 0) is complete."""
        with self._lock:
            self._steps[phase] = step + 1

    def finish(self, phase: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(phase, None)
            self._steps.pop(phase, None)

    def done(self) -> float:
        """Share done, 0..1; never less than it was."""
        with self._lock:
            roots = [phase for phase, (parent, _) in self._phases.items() if parent not in self._phases]
            if roots:
                self._best = max(self._best, min(1.0, self._share(roots[0], set())))
            return self._best

    def _share(self, phase: str, above: set[str]) -> float:
        _, steps = self._phases[phase]
        children = [child for child, (parent, _) in self._phases.items() if parent == phase and child not in above]
        inside = sum(self._share(child, above | {phase}) for child in children) / max(1, len(children))
        return min(1.0, (self._steps[phase] + inside) / steps)


# ---- timing cache (TensorRT 10 and 11) ------------------------------------------------------------------------------


def _timing_file(api: Api, folder: Path | None, gpu: str | None) -> Path | None:
    """Timings belong to one version and one GPU model."""
    digest = hashlib.sha256(f"{api.version}\n{gpu}".encode()).hexdigest()[:16]
    return None if folder is None else folder / "tensorrt-timing" / f"{digest}.cache"


def _use_timing_cache(config: Any, path: Path) -> None:
    try:
        data = check_trusted(path).read_bytes()
    except (OSError, UntrustedError):
        data = b""
    # A damaged file, or one of another version, is refused by TensorRT's own check: begin anew.
    cache = config.create_timing_cache(data) or config.create_timing_cache(b"")
    if not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Any, path: Path) -> None:
    """Add what this build has timed to the file; builds side by side each add theirs."""
    own = config.get_timing_cache()
    with _timing_lock:
        with suppress(OSError, UntrustedError):  # there is none yet, or somebody else can write it
            kept = config.create_timing_cache(check_trusted(path).read_bytes())
            if kept is not None:
                own.combine(kept, False)
        # Without the file the next build is slower. The engine cache in the same folder reports what is wrong with it.
        with suppress(OutputError):
            make_cache(path.parent.parent)
            write_bytes(path, bytes(own.serialize()), private=True)


# ---- inspector ----------------------------------------------------------------------------------------------------


def _layers(api: Api, plan: bytes) -> tuple[str | None, str | None]:
    """The inspector's JSON, or why there is none."""
    try:
        engine = api.module.Runtime(api.log).deserialize_cuda_engine(plan)
    except TypeError:  # "factory function returned nullptr"
        engine = None
    if engine is None:
        return None, "the engine does not load on the machine that built it"
    inspector = engine.create_engine_inspector()
    text: str = inspector.get_engine_information(api.module.LayerInformationFormat.JSON)
    return text, None
