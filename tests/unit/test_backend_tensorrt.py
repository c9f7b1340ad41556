"""Engines built by TensorRT for RTX, which needs no GPU for that. Skipped where the package is not installed.

Loading and running them needs a driver: see ``test_backend_tensorrt_session.py``, and the contract suite on a GPU.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import calibration_images, pixels
from ml_dtypes import float8_e4m3fn
from onnx import TensorProto, helper, numpy_helper
from tiny import SIZE, tiny_checkpoint, tiny_checkpoint_file, tiny_model

import bdexport
from bdexport.backends import backend_class, get_backend, get_builder, tensorrt_common
from bdexport.backends import tensorrt as tensorrt_module
from bdexport.backends.base import BuildOptions, RunOptions
from bdexport.backends.tensorrt import Gpu, TensorRTBackend, TensorRTForRTXBackend
from bdexport.backends.tensorrt_build import _apply, _keep_timings, _monitor, _use_timing_cache, compute_capabilities
from bdexport.backends.tensorrt_common import (
    LAYERS,
    PLAN,
    RTX,
    Api,
    EngineDescription,
    Flavour,
    load_api,
    read_engine,
    read_layers,
    write_engine,
)
from bdexport.build import BuiltBundle, build_bundle, bundle_from_model
from bdexport.build_engines import BUILT, REUSED
from bdexport.bundle import Bundle, open_bundle
from bdexport.calibrate import CalibrationRequest, calibrated
from bdexport.cli.main import main
from bdexport.config import BuildConfig, CalibrationConfig, TensorRTConfig
from bdexport.engine_cache import EngineCache
from bdexport.errors import BackendError, BuildError, UsageError
from bdexport.packages import install_line
from bdexport.parts import FULL, POLICY, part_names
from bdexport.precision import typed_graphs
from bdexport.verify import verify_against_graphs

NAME = "tensorrt-rtx"
TARGETS = TensorRTConfig(opt_batch=2, compute_capabilities=("8.0", "12.0"))
CHANNELS = 4


@pytest.fixture(scope="session")
def backend() -> TensorRTForRTXBackend:
    found = TensorRTForRTXBackend().can_build()
    if not found.ok:
        pytest.skip(f"{NAME}: {found.reason}")
    return TensorRTForRTXBackend()


@pytest.fixture(scope="session")
def api(backend: TensorRTForRTXBackend) -> Api:
    return load_api(RTX)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("rtx-cache"))


def build(
    folder: Path, cache: EngineCache | None, calibration: CalibrationRequest | None = None, **more: Any
) -> BuiltBundle:
    model = tiny_model()
    settings: dict[str, Any] = {"max_batch": 32, "jobs": 2, "tensorrt": TARGETS} | more
    config = BuildConfig(NAME, **settings)
    return bundle_from_model(
        model,
        tiny_checkpoint(model),
        folder,
        get_builder(NAME),
        config=config,
        checkpoint_sha256="0" * 64,
        overwrite=True,
        cache=cache,
        calibration=calibration,
    )


@pytest.fixture(scope="session")
def bundle(backend: TensorRTForRTXBackend, cache: EngineCache, tmp_path_factory: pytest.TempPathFactory) -> BuiltBundle:
    """Every part of a network, two at a time."""
    return build(tmp_path_factory.mktemp("rtx") / "bundle", cache)


def read(bundle: Bundle, part: str) -> tuple[EngineDescription, bytes]:
    return read_engine(bundle.engine(part), part, RTX, "rebuild")


def weights_of(graph: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(graph).graph.initializer}


def graph_file(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    dtype: int = TensorProto.FLOAT,
    output: tuple[int, ...] = (CHANNELS, *SIZE),
) -> Path:
    """A graph x -> y of some layers, in one dtype at both ends."""
    x = helper.make_tensor_value_info("x", dtype, ["N", CHANNELS, *SIZE])
    y = helper.make_tensor_value_info("y", dtype, ["N", *output])
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "part", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def conv(source: str, weight: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [target], name="conv", kernel_shape=[3, 3], pads=[1] * 4)


# ---- building -----------------------------------------------------------------------------------------------------


def test_every_part_has_an_engine_of_its_own_weights(bundle: BuiltBundle) -> None:
    """Oracle: the ONNX graph's weights: TensorRT keeps biases as they are, and convolutions with channels last."""
    assert tuple(bundle.manifest.parts) == part_names(3, [1])
    for part in bundle.manifest.parts:
        description, plan = read(bundle, part)
        assert description.part == part
        for name, array in weights_of(bundle.graph(part)).items():
            if array.dtype == np.float32:
                kept = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
                assert np.ascontiguousarray(kept).tobytes() in plan, (part, name)


def test_engines_of_equal_shape_hold_their_own_weights(bundle: BuiltBundle) -> None:
    """Oracle: another block's bias is in another block's engine only."""
    bias = weights_of(bundle.graph("block_00"))["branch.conv1.bias"].tobytes()
    holders = [part for part in bundle.manifest.parts if bias in read(bundle, part)[1]]
    assert holders == ["block_00", FULL]


def test_the_bundle_says_what_it_is_built_for(bundle: BuiltBundle, api: Api) -> None:
    """Oracle: what was asked for; no GPU and no part of this machine but its platform took part."""
    manifest = bundle.manifest
    assert (manifest.backend, manifest.max_batch, manifest.compute_capability) == (NAME, 32, "8.0, 12.0")
    assert manifest.versions[NAME] == api.version
    assert manifest.fingerprint == "linux x86_64"
    description, _ = read(bundle, POLICY)
    assert description.batches == (1, 2, 32)
    assert description.compute_capabilities == ("8.0", "12.0")
    assert description.version == api.version


def test_a_second_build_builds_nothing(
    bundle: BuiltBundle, cache: EngineCache, tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same files although TensorRT's builder cannot be had any more; another target must build."""
    assert set(bundle.engines.values()) == {BUILT}
    with monkeypatch.context() as patch:
        patch.delattr(api.module, "Builder")
        again = build(tmp_path / "again", cache)
        assert set(again.engines.values()) == {REUSED}
        assert all(again.engine(part).read_bytes() == bundle.engine(part).read_bytes() for part in again.manifest.parts)
        with pytest.raises(AttributeError, match="Builder"):
            build(tmp_path / "other", cache, tensorrt=replace(TARGETS, compute_capabilities=("8.6",)))


def test_the_same_graph_gives_the_same_engine(
    bundle: BuiltBundle, backend: TensorRTForRTXBackend, tmp_path: Path
) -> None:
    """Property: building is deterministic, also beside another build."""
    engine = tmp_path / "engine"
    backend.build_part("head", bundle.graph("head"), engine, BuildOptions(max_batch=32, tensorrt=TARGETS))
    assert engine.read_bytes() == bundle.engine("head").read_bytes()


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_layers_compute_in_what_the_graph_says(backend: TensorRTForRTXBackend, tmp_path: Path, kind: str) -> None:
    """Oracle: the weights are in the engine in the graph's own type, and not in float32."""
    weight = np.random.default_rng(0).integers(-99, 99, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
    if kind == "fp16":
        stored: np.ndarray = weight.astype(np.float16)
        nodes = [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            conv("half", "w", "out"),
            helper.make_node("Cast", ["out"], ["y"], to=TensorProto.FLOAT),
        ]
        weights = {"w": stored}
    else:
        stored = weight
        scale, zero = np.full(CHANNELS, 0.1, np.float32), np.zeros(CHANNELS, np.int8)
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], axis=0),
            conv("d", "dw", "y"),
        ]
        weights = {"w": stored, "ws": scale, "wz": zero, "s": np.float32(0.1), "z": np.int8(0)}  # type: ignore[dict-item]
    graph = graph_file(tmp_path / "graph.onnx", nodes, {name: np.asarray(array) for name, array in weights.items()})
    backend.build_part("block_00", graph, tmp_path / "engine", BuildOptions())
    _, plan = read_engine(tmp_path / "engine", "block_00", RTX, "rebuild")
    assert np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).astype(np.float32).tobytes() not in plan
    layouts = (stored, stored.transpose(0, 2, 3, 1), stored.transpose(0, 2, 3, 1)[:1], stored[:1])
    assert any(np.ascontiguousarray(layout).tobytes() in plan for layout in layouts)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_parts_in_half_precision_become_engines(
    bundle: BuiltBundle, backend: TensorRTForRTXBackend, tmp_path: Path, precision: str
) -> None:
    """Oracle: TensorRT's parser and builder take what the conversion makes of a real block; float32 biases are gone."""
    part = "block_00"
    graph = typed_graphs({part: bundle.graph(part)}, precision, NAME, tmp_path)[part]
    backend.build_part(part, graph, tmp_path / "engine", BuildOptions(precision))
    _, plan = read_engine(tmp_path / "engine", part, RTX, "rebuild")
    weights = weights_of(bundle.graph(part))
    assert precision in backend.precisions
    assert not any(np.ascontiguousarray(array).tobytes() in plan for array in weights.values() if array.ndim == 1)


@pytest.mark.parametrize("target", ["8.9", "12.0", "12.1"])
def test_real_parts_in_fp8_become_engines(
    bundle: BuiltBundle, backend: TensorRTForRTXBackend, tmp_path: Path, target: str
) -> None:
    """Oracle: ml_dtypes: the weights are in the engine as E4M3 of the graph's scale, and not in float32."""
    model = tiny_model()
    graphs = {part: bundle.graph(part) for part in bundle.manifest.parts}
    scales = calibrated(model, graphs, tiny_checkpoint(model).preprocess, pixels(16), CalibrationConfig())
    part = "block_01"
    graph = typed_graphs({part: graphs[part]}, "fp8", NAME, tmp_path, scales)[part]
    options = BuildOptions("fp8", tensorrt=TensorRTConfig(opt_batch=2, compute_capabilities=(target,)))
    backend.build_part(part, graph, tmp_path / "engine", options)
    description, plan = read_engine(tmp_path / "engine", part, RTX, "rebuild")
    assert description.compute_capabilities == (target,)
    constants = weights_of(graph)
    name = "branch.conv1.weight"
    weight, scale = constants[name], constants[f"{name}_scale"]
    rounded = (weight / scale[:, None, None, None]).astype(float8_e4m3fn)
    assert np.abs(rounded.astype(np.float32)).max(axis=(1, 2, 3)).tolist() == [448.0] * len(scale)
    assert np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).tobytes() not in plan
    layouts = [rounded.transpose(axes) for axes in ((0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 1, 0), (1, 2, 3, 0))]
    assert any(np.ascontiguousarray(layout).tobytes() in plan for layout in layouts)


def test_a_whole_network_in_fp8(backend: TensorRTForRTXBackend, tmp_path: Path) -> None:
    """Oracle: TensorRT takes every part; targets are all that have FP8, and the manifest names them."""
    request = calibration_images(tmp_path)
    settings = TensorRTConfig(opt_batch=2)
    made = build(tmp_path / "bundle", None, calibration=request, precision="fp8", tensorrt=settings)
    assert set(made.engines.values()) == {BUILT}
    assert made.manifest.precision == "fp8"
    assert made.manifest.compute_capability == "8.9, 12.0, 12.1"


def test_one_calibration_serves_int8_and_fp8(
    backend: TensorRTForRTXBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the files; refused without scales, and on a CPU backend with the remedy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDEXPORT_CACHE", str(tmp_path / "cache"))
    checkpoint = str(tiny_checkpoint_file(tmp_path / "tiny.safetensors"))
    line = ["build", checkpoint, "--backend", NAME, "--compute-capability", "12.0", "--precision"]
    assert main([*line, "fp8", "--out", "fp8"]) == 2
    assert "int8 and fp8 need scales" in capsys.readouterr().err
    data = str(calibration_images(tmp_path).data)
    assert main(["calibrate", checkpoint, "--dataset", "folder", "--data", data, "--images", "9"]) == 0
    for precision in ("int8", "fp8"):
        assert main([*line, precision, "--out", precision]) == 0
        assert open_bundle(tmp_path / precision).manifest.precision == precision
    capsys.readouterr()
    assert main(["build", checkpoint, "--precision", "fp8", "--out", "cpu"]) == 2
    assert "build with --precision int8, or with --backend tensorrt" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [("8.0",), ("12.0", "7.5")])
def test_a_target_without_fp8_is_refused_before_any_work(
    backend: TensorRTForRTXBackend, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """Oracle: which GPUs have FP8 units, and the remedy, in the error; TensorRT itself refuses such a graph."""
    settings = TensorRTConfig(compute_capabilities=targets)
    said = rf"no FP8: got {targets[-1]}, expected 8\.9, 12\.0, 12\.1 for --precision fp8; .*int8 or fp16"
    with pytest.raises(UsageError, match=said):
        build(tmp_path / "bundle", None, precision="fp8", tensorrt=settings)
    assert list(tmp_path.iterdir()) == []


# ---- settings -----------------------------------------------------------------------------------------------------


def test_settings_reach_tensorrt(api: Api) -> None:
    """Oracle: TensorRT's own configuration object. TF32 is on there by default, and off here."""
    trt = api.module
    builder = trt.Builder(api.log)
    config = builder.create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32)
    _apply(api, config, TensorRTConfig())
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    config = builder.create_builder_config()
    settings = TensorRTConfig(
        workspace_mib=64,
        optimization_level=1,
        tf32=True,
        version_compatible=True,
        compute_capabilities=("8.9", "12.0"),
    )
    _apply(api, config, settings)
    assert config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.builder_optimization_level == 1
    assert config.num_compute_capabilities == 2
    assert [config.get_compute_capability(index) for index in range(2)] == [
        trt.ComputeCapability.SM89,
        trt.ComputeCapability.SM120,
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"opt_batch": 64}, "1 <= --min-batch <= --opt-batch <= --max-batch"),
        ({"min_batch": 0}, "--min-batch"),
        ({"workspace_mib": 0}, "--workspace-mib"),
        ({"optimization_level": 6}, r"got 6, expected 0\.\.5"),
        ({"compute_capabilities": ("9.0",)}, r"got 9\.0, expected some of 7\.5, 8\.0"),
        ({"compute_capabilities": ("8.0", "8.0")}, "each once"),
        ({"hardware_compatible": "ampere+"}, "no effect; name the GPUs with --compute-capability"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(
    backend: TensorRTForRTXBackend, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    """Oracle: the option and what would do, in the error; nothing is left."""
    with pytest.raises(UsageError, match=said):
        build(tmp_path / "bundle", None, tensorrt=TensorRTConfig(**settings))
    assert list(tmp_path.iterdir()) == []


def test_settings_of_tensorrt_are_refused_by_other_backends(tmp_path: Path) -> None:
    """Oracle: no option is silently without effect."""
    config = BuildConfig("onnxruntime", tensorrt=TensorRTConfig(tf32=True))
    with pytest.raises(UsageError, match="no effect on backend onnxruntime"):
        build_bundle(tiny_checkpoint_file(tmp_path / "c.safetensors"), tmp_path / "bundle", config=config)


def test_there_is_a_largest_batch(backend: TensorRTForRTXBackend) -> None:
    """Oracle: the one default, which also goes into the manifest."""
    assert backend.resolved(BuildOptions()).max_batch == TensorRTConfig.max_batch
    assert backend.resolved(BuildOptions(max_batch=3)).max_batch == 3


def test_targets_are_those_of_the_package(api: Api) -> None:
    """Oracle: TensorRT's enumeration, read the other way round."""
    for text, value in compute_capabilities(api).items():
        assert value.name == f"SM{text.replace('.', '')}"


# ---- errors -------------------------------------------------------------------------------------------------------


def test_an_unsupported_operator_is_named(backend: TensorRTForRTXBackend, tmp_path: Path) -> None:
    """Oracle: part, node and operator of a graph with one that TensorRT does not have; no engine is left."""
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Unique", ["a"], ["y"], name="odd one")]
    graph = graph_file(tmp_path / "graph.onnx", nodes, {})
    with pytest.raises(
        BuildError, match=r"block_07 \[tensorrt-rtx\]: node odd one \(Unique\): UNSUPPORTED_NODE.* said"
    ):
        backend.build_part("block_07", graph, tmp_path / "engine", BuildOptions())
    assert not (tmp_path / "engine").exists()


def test_a_node_that_does_not_fit_is_named_with_the_reason(backend: TensorRTForRTXBackend, tmp_path: Path) -> None:
    """Oracle: TensorRT's reason, quoted."""
    graph = graph_file(tmp_path / "g.onnx", [conv("x", "w", "y")], {"w": np.zeros((4, 5, 3, 3), np.float32)})
    with pytest.raises(BuildError, match=r"node conv \(Conv\): INVALID_NODE, .*failed to broadcast to input"):
        backend.build_part("stem", graph, tmp_path / "engine", BuildOptions())


@pytest.mark.parametrize("damage", ["cut", "text", "missing"])
def test_a_graph_that_cannot_be_read_is_named(backend: TensorRTForRTXBackend, tmp_path: Path, damage: str) -> None:
    """Oracle: part and file in the error."""
    graph = graph_file(tmp_path / "graph.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    if damage == "missing":
        graph.unlink()
    else:
        graph.write_bytes(graph.read_bytes()[:-20] if damage == "cut" else b"hello")
    with pytest.raises(BuildError, match=r"head \[tensorrt-rtx\]: "):
        backend.build_part("head", graph, tmp_path / "engine", BuildOptions())


def test_a_machine_that_tensorrt_does_not_build_on(
    backend: TensorRTForRTXBackend, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what TensorRT's Python package raises for an object that its library did not make, as a BuildError."""

    def made_by_no_library(log: Any) -> Any:
        log.log(log.ERROR, "CUDA initialization failure with error: 209")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    graph = graph_file(tmp_path / "graph.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    monkeypatch.setattr(api.module, "Builder", made_by_no_library)
    with pytest.raises(BuildError, match=r"stem \[tensorrt-rtx\]: nothing can be built.*said: CUDA initialization"):
        backend.build_part("stem", graph, tmp_path / "engine", BuildOptions())


def test_tensorrts_log_is_quoted(backend: TensorRTForRTXBackend, tmp_path: Path) -> None:
    """Oracle: the library that version compatibility needs and this package does not bring, in TensorRT's own words."""
    graph = graph_file(tmp_path / "graph.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    options = BuildOptions(tensorrt=TensorRTConfig(version_compatible=True))
    quoted = r"stem \[tensorrt-rtx\]: cannot be built; TensorRT for RTX .* said: .*libnvinfer_lean"
    with pytest.raises(BuildError, match=quoted):
        backend.build_part("stem", graph, tmp_path / "engine", options)


def test_builds_side_by_side_do_not_mix_their_logs(backend: TensorRTForRTXBackend, tmp_path: Path) -> None:
    """Invariant: each of four builds at a time reports its own node, and no other."""
    said: dict[str, str] = {}

    def fail(name: str) -> None:
        graph = graph_file(tmp_path / f"{name}.onnx", [helper.make_node("Unique", ["x"], ["y"], name=name)], {})
        with pytest.raises(BuildError) as caught:
            backend.build_part("stem", graph, tmp_path / name, BuildOptions())
        said[name] = str(caught.value)

    names = [f"node{number}" for number in range(4)]
    threads = [threading.Thread(target=fail, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert [other for other in names if other in said[name]] == [name]


# ---- progress -----------------------------------------------------------------------------------------------------


def test_progress_is_told_while_an_engine_is_built(backend: TensorRTForRTXBackend, tmp_path: Path) -> None:
    """Property: shares ascend, from little to the last of TensorRT's six steps."""
    graph = graph_file(tmp_path / "graph.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    told: list[float] = []

    def progress(part: str, share: float) -> bool:
        assert part == "stem"
        told.append(share)
        return True

    backend.build_part("stem", graph, tmp_path / "engine", BuildOptions(progress=progress))
    assert len(told) > 10
    assert told == sorted(told)
    assert 0 < told[0] < 0.3
    assert 0.8 <= told[-1] <= 1


def test_a_build_can_be_stopped(backend: TensorRTForRTXBackend, tmp_path: Path) -> None:
    """Oracle: the answer "no" ends the build at the next step, and leaves no file."""
    graph = graph_file(tmp_path / "graph.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    asked: list[float] = []

    def stop(_part: str, share: float) -> bool:
        asked.append(share)
        return len(asked) < 3

    with pytest.raises(BuildError, match="was stopped"):
        backend.build_part("stem", graph, tmp_path / "engine", BuildOptions(progress=stop))
    assert len(asked) < 10
    assert not (tmp_path / "engine").exists()


def test_phases_inside_phases_are_shares_of_one(api: Api) -> None:
    """Oracle: worked by hand: half of a phase in the second of four steps is 1.5 / 4."""
    told: list[float] = []

    def progress(_part: str, share: float) -> bool:
        told.append(share)
        return True

    monitor = _monitor(api, "stem", progress)
    monitor.phase_start("all", None, 4)
    monitor.step_complete("all", 0)
    monitor.phase_start("inner", "all", 2)
    monitor.step_complete("inner", 0)
    monitor.phase_finish("inner")
    monitor.step_complete("all", 1)
    assert told == [0.25, 0.375, 0.5]


# ---- timing cache -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timings_are_kept_and_read_again(api: Api, tmp_path: Path) -> None:
    """Oracle: TensorRT takes back what it gave, and a damaged file does not stop a build.

    On the API of TensorRT for RTX, which has timing caches but no use for them; TensorRT itself needs a GPU.
    """
    path = tmp_path / "folder" / "timing.cache"
    config = api.module.Builder(api.log).create_builder_config()
    _use_timing_cache(config, path)
    _keep_timings(config, path)
    first = path.read_bytes()
    assert first
    again = api.module.Builder(api.log).create_builder_config()
    _use_timing_cache(again, path)
    assert again.get_timing_cache() is not None
    _keep_timings(again, path)
    path.write_bytes(b"damaged")
    _use_timing_cache(config, path)
    _keep_timings(config, path)
    assert len(path.read_bytes()) >= len(first)


class StandIn(TensorRTBackend):
    """The backend ``tensorrt`` with the builder of TensorRT for RTX, since TensorRT itself needs a GPU to be imported
    for anything; the GPU is declared.
    """

    flavour = Flavour("tensorrt", "tensorrt_rtx", "TensorRT")


@pytest.fixture
def stand_in(backend: TensorRTForRTXBackend, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(tensorrt_common, "OLDEST", (1, 0))
    monkeypatch.setattr(tensorrt_module, "_gpu", lambda: Gpu("NVIDIA A100", "8.0"))
    return StandIn()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorrt_builds_for_the_gpu_that_is_here(stand_in: StandIn, tmp_path: Path, own_cache: Path) -> None:
    """Oracle: the GPU's name and capability in fingerprint, options and engine; timings in the cache folder."""
    assert stand_in.available().ok
    assert stand_in.fingerprint() == "NVIDIA A100"
    options = stand_in.resolved(BuildOptions(cache_folder=own_cache))
    assert options.tensorrt.compute_capabilities == ("8.0",)
    assert stand_in.resolved(options) == options
    graph = graph_file(tmp_path / "graph.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    for _ in range(2):
        stand_in.build_part("stem", graph, tmp_path / "engine", options)
    description, _ = read_engine(tmp_path / "engine", "stem", stand_in.flavour, "rebuild")
    assert (description.gpu, description.compute_capabilities) == ("NVIDIA A100", ("8.0",))
    assert len(list((own_cache / "tensorrt-timing").iterdir())) == 1
    if not get_builder(NAME).available().ok:
        assert description.layers == "the engine does not load on the machine that built it"


def test_tensorrt_has_no_fp8_on_a_gpu_without_it(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an A100 (8.0) has none, a Hopper GPU (9.0) has it."""
    with pytest.raises(UsageError, match=r"backend tensorrt: the GPU has no FP8: got 8\.0, expected 8\.9 or newer"):
        stand_in.resolved(BuildOptions("fp8"))
    monkeypatch.setattr(tensorrt_module, "_gpu", lambda: Gpu("NVIDIA H200", "9.0"))
    assert stand_in.resolved(BuildOptions("fp8")).tensorrt.compute_capabilities == ("9.0",)


def test_tensorrt_has_no_other_targets(stand_in: StandIn) -> None:
    """Oracle: the remedy names the backend that has them, and the levels that TensorRT knows."""
    with pytest.raises(UsageError, match="tensorrt-rtx builds for others"):
        stand_in.resolved(BuildOptions(tensorrt=TensorRTConfig(compute_capabilities=("8.9",))))
    with pytest.raises(UsageError, match=r"got all, expected ampere\+ or same-compute-capability"):
        stand_in.resolved(BuildOptions(tensorrt=TensorRTConfig(hardware_compatible="all")))
    compatible = TensorRTConfig(hardware_compatible="ampere+")
    assert stand_in.resolved(BuildOptions(tensorrt=compatible)).tensorrt.hardware_compatible == "ampere+"


def test_another_major_version_is_refused(backend: TensorRTForRTXBackend) -> None:
    """Oracle: version 1 of TensorRT for RTX, taken for TensorRT; both sides and the remedy."""

    class Old(StandIn):
        flavour = Flavour("tensorrt", "tensorrt_rtx", "TensorRT, an old one")

    found = Old().available()
    assert not found.ok
    assert re.search(
        r"got 1\..*, expected 10\.3 or newer, up to 11\.x$", found.reason
    )  # the remedy comes after it, once
    assert found.remedy == install_line("tensorrt")


@pytest.mark.parametrize(
    ("version", "known"), [("8.6.1", False), ("10.0.1", False), ("10.3.0", True), ("11.4.0.9", True), ("12.0.0", False)]
)
def test_versions_that_are_known(monkeypatch: pytest.MonkeyPatch, version: str, known: bool) -> None:
    """Oracle: the extra's bounds in pyproject.toml; what lies outside is refused before anything is called."""
    name = f"tensorrt_{version.replace('.', '_')}"
    levels = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2}
    module = SimpleNamespace(__version__=version, ILogger=type("ILogger", (), levels))
    monkeypatch.setitem(sys.modules, name, module)
    flavour = Flavour("tensorrt", name, "TensorRT")
    if known:
        assert load_api(flavour).version == version
        return
    with pytest.raises(BackendError, match=re.escape(f"got {version}, expected 10.3 or newer, up to 11.x")):
        load_api(flavour)


def test_a_driver_that_is_too_old_is_named_with_both_versions(
    backend: TensorRTForRTXBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what opening CUDA says there, in the reason for which the backend is not available."""

    def old() -> None:
        raise BackendError("cuda: driver too old", got="11.8", expected="CUDA 12.0 or newer", remedy="update it")

    monkeypatch.setattr(tensorrt_module, "_gpu", old)
    found = backend.available()
    assert found.reason.endswith("cuda: driver too old: got 11.8, expected CUDA 12.0 or newer")
    assert found.remedy == "update it"


# ---- where it cannot run ------------------------------------------------------------------------------------------


def test_without_a_gpu_it_builds_and_says_that_nothing_was_verified(bundle: BuiltBundle) -> None:
    """Oracle: a note and no verification in the manifest, and the reason for missing layers; with a GPU, both."""
    description, _ = read(bundle, FULL)
    layers = read_layers(bundle.engine(FULL))
    if get_builder(NAME).available().ok:
        assert bundle.manifest.verification is not None
        assert (layers is None) == (description.layers is not None)
        return
    assert bundle.manifest.verification is None
    assert any("not verified" in note and "bdexport verify" in note for note in bundle.notes)
    assert layers is None
    assert description.layers is not None


def test_engines_for_another_gpu_are_built_and_not_verified(
    backend: TensorRTForRTXBackend, cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the note names both sides; a machine whose GPU is no target builds what one without any GPU builds."""
    monkeypatch.setattr(tensorrt_module, "_gpu", lambda: Gpu("NVIDIA L4", "8.9"))
    built = build(tmp_path / "other", cache)
    reason = "they are for compute capability 8.0, 12.0; NVIDIA L4 has 8.9"
    assert any("not verified" in note and reason in note for note in built.notes)
    assert built.manifest.verification is None
    targets = BuildOptions(tensorrt=replace(TARGETS, compute_capabilities=("8.0", "8.9")))
    assert backend.can_run(targets).ok
    assert backend.can_run(BuildOptions()).ok


def test_a_gpu_that_it_does_not_know_runs_nothing(
    backend: TensorRTForRTXBackend, bundle: BuiltBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the enumeration of this TensorRT for RTX has no 9.0; the reason names the GPU and what is known."""
    monkeypatch.setattr(tensorrt_module, "_gpu", lambda: Gpu("NVIDIA H200", "9.0"))
    for targets in (BuildOptions(), BuildOptions(tensorrt=replace(TARGETS, compute_capabilities=("8.0",)))):
        found = backend.can_run(targets)
        assert not found.ok
        assert "has no compute capability 9.0, which NVIDIA H200 has; it knows 7.5, 8.0" in found.reason
    with pytest.raises(BackendError, match=r"no compute capability 9\.0, which NVIDIA H200 has.*--backend tensorrt"):
        backend.open(Bundle(bundle.path, bundle.manifest), RunOptions("cuda"))


def test_without_a_gpu_it_does_not_run_and_says_why(bundle: BuiltBundle) -> None:
    """Oracle: reason and remedy, by whatever asks for the engines."""
    available = get_builder(NAME).available()
    if available.ok:
        pytest.skip("there is a GPU")
    for use in (bdexport.load, verify_against_graphs):
        with pytest.raises(BackendError, match=r"tensorrt-rtx: not available \(.* is installed; cuda: ") as caught:
            use(bundle)
        assert available.remedy is not None
        assert available.remedy in str(caught.value)
    with pytest.raises(BackendError, match="not available"):
        get_backend(NAME)


def test_a_missing_package_is_named() -> None:
    """Oracle: the extra that brings it; the table's classes load without any TensorRT."""
    for name in ("tensorrt", NAME):
        backend = backend_class(name)()
        for found in (backend.available(), backend.can_build()):
            if not found.ok and "not installed" in found.reason and "cuda" not in found.reason:
                assert found.remedy == install_line(name)


def test_what_a_session_asks_of_tensorrt_is_there(api: Api) -> None:
    """Oracle: the package's own signatures, as its bindings write them into docstrings; the run time needs a driver."""
    trt = api.module
    for path, *arguments in (
        ("IExecutionContext.set_device_memory", "memory", "size"),
        ("IExecutionContext.set_input_shape", "name", "shape"),
        ("IExecutionContext.set_tensor_address", "name", "memory"),
        ("IExecutionContext.execute_async_v3", "stream_handle"),
        ("ICudaEngine.create_execution_context", "strategy"),
        ("ICudaEngine.create_execution_context", "runtime_config"),
        ("ICudaEngine.create_runtime_config",),
        ("ICudaEngine.create_engine_inspector",),
        ("ICudaEngine.get_tensor_name", "index"),
        ("ICudaEngine.get_tensor_shape", "name"),
        ("ICudaEngine.get_tensor_dtype", "name"),
        ("EngineInspector.get_engine_information", "format"),
        ("IRuntimeConfig.set_execution_context_allocation_strategy", "strategy"),
        ("IRuntimeConfig.create_runtime_cache",),
        ("IRuntimeConfig.set_runtime_cache", "cache"),
        ("IRuntimeCache.serialize",),
        ("IRuntimeCache.deserialize", "blob"),
        ("Runtime.deserialize_cuda_engine", "serialized_engine"),
        ("Runtime.get_engine_validity", "buffer"),
    ):
        owner, _, name = path.partition(".")
        text = getattr(getattr(trt, owner), name).__doc__
        forms = [re.findall(r"(?:^|, )(\w+): ", form)[1:] for form in re.findall(rf"{name}\((self: .*)\) ->", text)]
        assert arguments in forms, f"{path}: {forms}"
    for path in (
        *("ICudaEngine.device_memory_size_v2", "ICudaEngine.num_io_tensors"),
        *("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", "IRuntimeConfig.cuda_graph_strategy"),
        *("Runtime.engine_header_size", "Runtime.engine_host_code_allowed", "CudaGraphStrategy.DISABLED"),
        *("ExecutionContextAllocationStrategy.USER_MANAGED", "LayerInformationFormat.JSON"),
        *("DynamicShapesKernelSpecializationStrategy.EAGER", "DynamicShapesKernelSpecializationStrategy.LAZY"),
        *("EngineInvalidityDiagnostics.UNSUPPORTED_CC", "DataType.FLOAT"),
    ):
        owner, _, name = path.partition(".")
        assert hasattr(getattr(trt, owner), name), path


# ---- engine files -------------------------------------------------------------------------------------------------


def test_layers_are_kept_where_they_can_be_had(tmp_path: Path) -> None:
    """Oracle: what was written."""
    description = EngineDescription("stem", NAME, "1.0", None, ("8.9",), (1, 1, 2), False, None, None)
    write_engine(tmp_path / "e", description, b"plan", json.dumps({"Layers": ["conv"]}))
    assert read_engine(tmp_path / "e", "stem", RTX, "rebuild") == (description, b"plan")
    assert read_layers(tmp_path / "e") == {"Layers": ["conv"]}


@pytest.mark.parametrize("damage", ["text", "member", "schema", "key", "part", "flavour"])
def test_a_file_that_is_no_engine_is_refused(tmp_path: Path, damage: str) -> None:
    """Oracle: the error names part and file, and for another part's engine both sides."""
    import zipfile

    path = tmp_path / "engine"
    description = EngineDescription("stem", NAME, "1.0", None, (), (1, 1, 2), False, None, None)
    changed = {
        "part": replace(description, part="head"),
        "flavour": replace(description, flavour="tensorrt"),
    }
    write_engine(path, changed.get(damage, description), b"plan", None)
    if damage == "text":
        path.write_text("no zip")
    elif damage in ("member", "schema", "key"):
        with zipfile.ZipFile(path) as packed:
            members = {name: packed.read(name) for name in packed.namelist()}
        assert LAYERS not in members
        if damage == "member":
            del members[PLAN]
        data = json.loads(members["part.json"])
        data |= {"schema": "other/1"} if damage == "schema" else {"more": 1} if damage == "key" else {}
        members["part.json"] = json.dumps(data).encode()
        with zipfile.ZipFile(path, "w") as packed:
            for name, content in members.items():
                packed.writestr(name, content)
    with pytest.raises(BackendError, match=r"stem \[tensorrt-rtx\]: .*engine.*; rebuild"):
        read_engine(path, "stem", RTX, "rebuild")


# ---- command line -------------------------------------------------------------------------------------------------


def test_build_command(backend: TensorRTForRTXBackend, tmp_path: Path) -> None:
    """Oracle: the manifest that the command leaves, and its JSON: built first, reused then."""
    checkpoint = tiny_checkpoint_file(tmp_path / "tiny.safetensors")
    command = ["build", str(checkpoint), "--backend", NAME, "--out", str(tmp_path / "bundle"), "--overwrite"]
    command += ["--max-batch", "16", "--opt-batch", "4", "--compute-capability", "8.6", "--jobs", "2", "--json"]
    found = []
    for number in range(2):
        result = tmp_path / f"{number}.json"
        assert main([*command, str(result)]) == 0
        found.append(json.loads(result.read_text()))
    assert found[0]["engines"] == {"built": 8, "reused": 0, "rebuilt": 0}
    assert found[1]["engines"] == {"built": 0, "reused": 8, "rebuilt": 0}
    opened = open_bundle(tmp_path / "bundle")
    assert read(opened, "stem")[0].batches == (1, 4, 16)
    assert opened.manifest.compute_capability == "8.6"
