"""What users would pick instead of bdexport: the full network in other engines, and skipping blocks by other means."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
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
from bdexport.partition import part_module, part_specs
from bdexport.parts import FULL, KEEP_THRESHOLD, Masks
from benchmarks.suite.graphs import IMAGE, KEEP, LOGITS, graph_with_ifs
from benchmarks.suite.networks import Images, Network
from benchmarks.suite.plan import Cell, SuiteConfig

Full: TypeAlias = Callable[[Images], NDArray[Any]]  # (N, 3, H, W) -> logits (N, classes)
Dynamic: TypeAlias = Callable[[Images, Masks | None], NDArray[Any]]  # masks None: the policy decides
TORCH_FULL, TORCH_SKIP, TORCH_COMPILE = (
    "PyTorch eager, full",
    "PyTorch eager, skipping per image",
    "torch.compile, full",
)
ORT_FULL, ORT_IF = "ONNX Runtime, full", "ONNX Runtime, one graph with If, per image"
OPENVINO_FULL = {precision: f"OpenVINO {precision.upper()}, full" for precision in ("fp32", "bf16")}
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


def full_baselines(cell: Cell, network: Network, config: SuiteConfig) -> list[FullBaseline]:
    """Those that compute here, or say why not; ``GPU_ONLY`` has the lines of a machine without a GPU."""
    found = [
        FullBaseline(TORCH_FULL, "fp32", lambda: _torch_full(network, cell)),
        FullBaseline(ORT_FULL, "fp32", lambda: _ort_full(network, cell, "CPUExecutionProvider")),
        *(
            FullBaseline(name, precision, lambda precision=precision: _openvino_full(network, cell, precision))  # type: ignore[misc]
            for precision, name in OPENVINO_FULL.items()
        ),
    ]
    if cell.usage != "sweep":
        found.insert(1, FullBaseline(TORCH_COMPILE, "fp32", lambda: _torch_compile(network, cell, config)))
    if not GPU_ONLY():
        found.append(FullBaseline(CUDA_GRAPHS, "fp32", lambda: _cuda_graphs(network, cell)))
        found.append(FullBaseline(ORT_CUDA, "fp32", lambda: _ort_full(network, cell, "CUDAExecutionProvider")))
    return found


def dynamic_baselines(cell: Cell, network: Network) -> list[DynamicBaseline]:
    """Skipping blocks in PyTorch image by image, as the authors' code profiles, and inside one ONNX graph."""
    skipping = DynamicBaseline(TORCH_SKIP, "fp32", lambda _forced: _torch_skipping(network))
    switched = DynamicBaseline(ORT_IF, "fp32", lambda forced: _ort_if(network, cell, forced))
    return [switched] if cell.usage == "sweep" else [skipping, switched]


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


def _torch_compile(network: Network, cell: Cell, config: SuiteConfig) -> Full:
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        raise BackendError("torch.compile: no C++ compiler here", remedy="install g++")
    if cell.batch not in config.compile_batches:
        asked = ", ".join(map(str, config.compile_batches)) or "none"
        raise BackendError(f"not compiled for batch {cell.batch}", expected=asked, remedy="pass --compile-batches")
    torch._dynamo.reset()
    compiled = torch.compile(network.model.network, dynamic=False)
    return _torch_call(compiled)


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
        raise BackendError(f"this onnxruntime has no {provider}", remedy='pip install "bdexport[gpu]"')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def _ort_full(network: Network, cell: Cell, provider: str) -> Full:
    session = _ort_session(full_graph(network), cell.threads, provider)
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


def _openvino_full(network: Network, cell: Cell, precision: str) -> Full:
    import_openvino()
    if precision == "bf16" and (reason := no_bf16_reason()):
        raise BackendError(f"bf16 is not available here ({reason})")
    model = core().read_model(full_graph(network))
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
