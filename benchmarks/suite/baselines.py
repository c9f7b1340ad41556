"""What users would pick instead of bdexport: the full network in other engines, and skipping blocks by other means."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from bdexport.backends import BACKENDS
from bdexport.backends.openvino_common import PRECISIONS, core, import_openvino, no_bf16_reason
from bdexport.errors import BackendError
from bdexport.export import onnx_from_module
from bdexport.hardware import gpu_report
from bdexport.models.resnet import Block
from bdexport.packages import install_line
from bdexport.partition import part_module, part_specs
from bdexport.parts import FULL, KEEP_THRESHOLD, Masks
from benchmarks.suite.graphs import IMAGE, KEEP, LOGITS, graph_with_ifs
from benchmarks.suite.int8 import int8_full_graph
from benchmarks.suite.networks import Images, Network
from benchmarks.suite.plan import Cell, SuiteConfig

Full: TypeAlias = Callable[[Images], NDArray[Any]]  # (N, 3, H, W) -> logits (N, classes)
Dynamic: TypeAlias = Callable[[Images, Masks | None], NDArray[Any]]  # masks None: the policy decides
TORCH_FULL, TORCH_SKIP, TORCH_COMPILE = (
    "PyTorch eager, full",
    "PyTorch eager, skipping per image",
    "torch.compile, full",
)
ORT_FULL, ORT_INT8, ORT_IF = (
    "ONNX Runtime, full",
    "ONNX Runtime INT8, full",
    "ONNX Runtime, one graph with If, per image",
)
OPENVINO_FULL = {precision: f"OpenVINO {precision.upper()}, full" for precision in ("fp32", "bf16", "int8")}
CUDA_GRAPHS, ORT_CUDA, TENSORRT = "PyTorch CUDA graphs, full", "ONNX Runtime CUDA, full", "TensorRT, full"


@dataclass(frozen=True)
class FullBaseline:
    """The undropped network; ``make`` does everything that is done once, and raises where it cannot be had here."""

    name: str
    precision: str
    make: Callable[[], Full]


@dataclass(frozen=True)
class DynamicBaseline:
    """Policy and kept blocks; ``make(forced)``: masks are given to each call."""

    name: str
    precision: str
    make: Callable[[bool], Dynamic]


def full_baselines(cell: Cell, network: Network, config: SuiteConfig, work: Path) -> list[FullBaseline]:
    """Those of the kinds asked for: they compute here, or say why not. ``work``: int8's graphs are kept there."""
    found: list[FullBaseline] = []
    if "torch" in config.kinds:
        found.append(FullBaseline(TORCH_FULL, "fp32", lambda: _torch_full(network, cell)))
    if "compile" in config.kinds and cell.usage != "sweep" and cell.batch in config.compile_batches:
        found.append(FullBaseline(TORCH_COMPILE, "fp32", lambda: _torch_compile(network, cell)))
    if "onnxruntime" in config.kinds:
        cpu = "CPUExecutionProvider"
        found.append(FullBaseline(ORT_FULL, "fp32", lambda: _ort_full(full_graph(network), cell, cpu)))
        int8 = lambda: _ort_full(int8_full_graph(network, "onnxruntime", config, work), cell, cpu)  # noqa: E731
        found.append(FullBaseline(ORT_INT8, "int8", int8))
    if "openvino" in config.kinds:
        for precision, name in OPENVINO_FULL.items():
            make = partial(_openvino_full, network, cell, precision, config, work)
            found.append(FullBaseline(name, precision, make))
    if "cuda" in config.kinds and not GPU_ONLY():
        cuda = "CUDAExecutionProvider"
        found.append(FullBaseline(CUDA_GRAPHS, "fp32", lambda: _cuda_graphs(network, cell)))
        found.append(FullBaseline(ORT_CUDA, "fp32", lambda: _ort_full(full_graph(network), cell, cuda)))
    return found


def dynamic_baselines(cell: Cell, network: Network, config: SuiteConfig) -> list[DynamicBaseline]:
    """Skipping blocks in PyTorch image by image, as the authors' code profiles, and inside one ONNX graph."""
    found = []
    if "torch" in config.kinds and cell.usage != "sweep":
        found.append(DynamicBaseline(TORCH_SKIP, "fp32", lambda _forced: _torch_skipping(network)))
    if "if-graph" in config.kinds:
        found.append(DynamicBaseline(ORT_IF, "fp32", lambda forced: _ort_if(network, cell, forced)))
    return found


def GPU_ONLY() -> dict[str, str]:  # noqa: N802 - read as a table: who needs a GPU, and why it is not measured
    """By name, the reason why the GPU's contestants are not measured here; empty with a GPU."""
    report = gpu_report()
    if report.gpus and torch.cuda.is_available():
        return {} if "tensorrt" in BACKENDS else {TENSORRT: "this bdexport has no tensorrt backend"}
    reason = f"no GPU here ({report.reason})" if not report.gpus else "this PyTorch build has no CUDA"
    return dict.fromkeys((CUDA_GRAPHS, ORT_CUDA, TENSORRT), reason)


# ---- PyTorch -----------------------------------------------------------------------------------------------------


def _torch_full(network: Network, cell: Cell) -> Full:
    torch.set_num_threads(cell.threads)
    return _torch_call(network.model.network)


def _torch_call(module: Callable[[torch.Tensor], torch.Tensor]) -> Full:
    def call(images: Images) -> NDArray[Any]:
        with torch.inference_mode():
            logits: NDArray[Any] = module(torch.from_numpy(images)).numpy()
        return logits

    return call


def _torch_compile(network: Network, cell: Cell) -> Full:
    """Compiled already, which the first call for a batch does: no call of a measurement is to hold that."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        raise BackendError("torch.compile: no C++ compiler here", remedy="install g++")
    torch._dynamo.reset()
    call = _torch_call(torch.compile(network.model.network, dynamic=False))
    call(np.zeros((cell.batch, 3, *network.checkpoint.preprocess.size), np.float32))
    return call


def _torch_skipping(network: Network) -> Dynamic:
    policy, net = network.model.policy, network.model.network

    def one(x: torch.Tensor, mask: list[bool]) -> torch.Tensor:
        x = net.stem(x)
        for keep, block in zip(mask, net.blocks, strict=True):
            assert isinstance(block, Block)
            x = block(x) if keep else block.dropped(x)
        logits: torch.Tensor = net.head(x)
        return logits

    def call(images: Images, masks: Masks | None) -> NDArray[Any]:
        with torch.inference_mode():
            rows = []
            for index in range(len(images)):
                x = torch.from_numpy(images[index : index + 1])
                decided = policy(x)[0] >= KEEP_THRESHOLD
                rows.append(one(x, decided.tolist() if masks is None else masks[index].tolist()))
            logits: NDArray[Any] = torch.cat(rows).numpy()
        return logits

    return call


def _cuda_graphs(network: Network, cell: Cell) -> Full:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = deepcopy(part_module(network.model, FULL)).cuda()  # the others go on with the host's
    size = network.checkpoint.preprocess.size
    static = torch.zeros(cell.batch, 3, *size, device="cuda")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):  # kernels are chosen and memory is taken outside the capture
            model(static)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = model(static)

    def call(images: Images) -> NDArray[Any]:
        static.copy_(torch.from_numpy(images))
        graph.replay()
        logits: NDArray[Any] = out.cpu().numpy()
        return logits

    return call


# ---- ONNX Runtime and OpenVINO -----------------------------------------------------------------------------------


def full_graph(network: Network) -> bytes:
    """The undropped network as an ONNX file, batch size free."""
    preprocess = network.checkpoint.preprocess
    specs = part_specs(network.model, preprocess)[FULL]
    return bytes(onnx_from_module(part_module(network.model, FULL), FULL, *specs).SerializeToString())


def _ort_session(model: bytes, threads: int, provider: str) -> Any:
    """A session as one has it without knowing more: every optimisation, these threads."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise BackendError(f"this onnxruntime has no {provider}", remedy=install_line("gpu"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def _ort_full(graph: bytes, cell: Cell, provider: str) -> Full:
    session = _ort_session(graph, cell.threads, provider)
    name = session.get_inputs()[0].name

    def call(images: Images) -> NDArray[Any]:
        logits: NDArray[Any] = session.run(None, {name: images})[0]
        return logits

    return call


def _ort_if(network: Network, cell: Cell, forced: bool) -> Dynamic:
    graph = graph_with_ifs(network.model, network.checkpoint.preprocess, forced)
    session = _ort_session(graph, cell.threads, "CPUExecutionProvider")
    outputs = [output.name for output in session.get_outputs()]
    place = outputs.index(LOGITS)

    def call(images: Images, masks: Masks | None) -> NDArray[Any]:
        rows = []
        for index in range(len(images)):
            feeds: dict[str, Any] = {IMAGE: images[index : index + 1]}
            if masks is not None:
                feeds[KEEP] = masks[index : index + 1].astype(np.float32)
            rows.append(session.run(None, feeds)[place])
        return np.concatenate(rows)

    return call


def _openvino_full(network: Network, cell: Cell, precision: str, config: SuiteConfig, work: Path) -> Full:
    import_openvino()
    if precision == "bf16" and (reason := no_bf16_reason()):
        raise BackendError(f"bf16 is not available here ({reason})")
    graph = int8_full_graph(network, "openvino", config, work) if precision == "int8" else full_graph(network)
    model = core().read_model(graph)
    model.reshape({0: [cell.batch, 3, *network.checkpoint.preprocess.size]})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": cell.threads,
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
    }
    request = core().compile_model(model, "CPU", settings).create_infer_request()

    def call(images: Images) -> NDArray[Any]:
        logits: NDArray[Any] = request.infer([images], share_inputs=True)[0]
        return logits

    return call
