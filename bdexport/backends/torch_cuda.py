"""The torch backend on a GPU: the reference there, and the GPU path that needs nothing but torch.

Tensors are torch's. All work is queued on one stream of the session or of the caller; whole paths can be captured into
``torch.cuda.CUDAGraph`` on static inputs, so the executor ``graph`` serves here as well.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.arrays import closed_error, row_span
from bdexport.backends.base import Rows
from bdexport.cuda.driver_api import stream_handle
from bdexport.cuda.exchange import is_device_array
from bdexport.errors import BackendError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bdexport.bundle import Manifest

WARMUP_RUNS = 2  # cuDNN chooses its algorithms in the first
Array = NDArray[Any]


def check_torch_cuda(device: str, ordinal: int) -> None:
    """Raises BackendError where torch has no such device."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = (
            f"torch {torch.__version__} is built {f'for CUDA {built}, and finds no GPU' if built else 'without CUDA'}"
        )
        remedy = "see `nvidia-smi`" if built else "install a torch that is built with CUDA"
        raise BackendError("backend torch: no such device", got=repr(device), expected=f"cpu ({reason})", remedy=remedy)
    count = torch.cuda.device_count()
    if ordinal >= count:
        raise BackendError("backend torch: no such device", got=repr(device), expected=f"cpu or cuda:0..{count - 1}")


class TorchCudaSession:
    """See :class:`bdexport.backends.base.Session`. Takes the modules over and moves them to the GPU."""

    threads = None

    def __init__(self, manifest: Manifest, modules: Mapping[str, nn.Module], ordinal: int, stream: Any = None) -> None:
        import torch

        self.device = f"cuda:{ordinal}"
        self._manifest, self._device = manifest, torch.device("cuda", ordinal)
        # TF32 keeps 10 bits of the mantissa and is torch's default for convolutions. There is no switch per session.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._owner = stream
        self._stream: Any = (
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if stream is None
            else torch.cuda.ExternalStream(stream_handle(stream), device=self._device)  # type: ignore[no-untyped-call]
        )
        with _reported("parts"):
            self._modules = {part: module.to(self._device) for part, module in modules.items()}
            torch.cuda.synchronize(self._device)  # the weights were copied on another stream
            self._pool = torch.cuda.graph_pool_handle()
            self._capture_stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._paths: set[TorchPath] = set()
        self._lock = threading.RLock()
        self._closed = False
        owner = "its own" if stream is None else "the caller's"
        self.notes: tuple[str, ...] = (
            f"device: {torch.cuda.get_device_name(self._device)}",
            f"torch {torch.__version__}, CUDA {torch.version.cuda}: the reference; TF32 off for the whole process",
            f"stream: {owner}",
        )

    def put(self, part: str, array: Any) -> Tensor:
        import torch

        caller = torch.cuda.current_stream(self._device)
        with self._queued(part):
            if is_device_array(array):
                # DLPack of torch's tensors orders them behind torch's current stream, which is the session's by now.
                self._stream.wait_stream(caller)
                return _checked(_adopted(array), self._manifest.parts[part].input.shape, self._device)
            values = np.ascontiguousarray(array, np.float32)
            pinned = torch.from_numpy(values if values.flags.writeable else values.copy()).pin_memory()
            return pinned.to(self._device, non_blocking=True)

    def get(self, part: str, tensor: Tensor) -> Array:
        with self._queued(part):
            result: Array = tensor.cpu().numpy()  # waits for the stream
        return result

    def wait(self) -> None:
        """Wait until everything that is queued is done: for measuring."""
        with self._queued("stream"):
            self._stream.synchronize()

    def export(self, tensor: Tensor) -> Tensor:
        """The tensor itself, ready for this thread's current stream in torch; torch's DLPack starts from that one."""
        import torch

        caller = torch.cuda.current_stream(self._device)
        with self._queued("logits"):
            caller.wait_stream(self._stream)
            tensor.record_stream(caller)  # the memory is not used again before that stream is done with it
        return tensor

    def run(self, part: str, x: Tensor) -> Tensor:
        with self._queued(part):
            out: Tensor = self._modules[part](x)
        return out

    def run_path(self, parts: Sequence[str], x: Tensor) -> Tensor:
        with self._queued("path"):
            for part in parts:
                x = self._modules[part](x)
        return x

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        span = row_span(rows)
        with self._queued("rows"):
            return x[span] if span is not None else x.index_select(0, self._numbers(rows))

    def replace(self, x: Tensor, rows: Rows, y: Tensor) -> Tensor:
        with self._queued("rows"):
            self._write(x, rows, y)
        return x

    def merge(self, pieces: Sequence[tuple[Rows, Tensor]], batch: int) -> Tensor:
        with self._queued("rows"):
            out = pieces[0][1].new_empty((batch, *pieces[0][1].shape[1:]))
            for rows, piece in pieces:
                self._write(out, rows, piece)
        return out

    def can_capture(self) -> tuple[bool, str]:
        """Always: torch captures."""
        return True, "torch captures graphs"

    def capture_path(self, parts: Sequence[str], batch: int) -> TorchPath:
        """The path as one graph for batches of that size. Raises BackendError when the capture is refused."""
        import torch

        with self._queued("path"):
            modules = [self._modules[part] for part in parts]
            shape = self._manifest.parts[parts[0]].input.shape
            x = torch.zeros((batch, *shape), device=self._device)
            self._stream.synchronize()
            with torch.cuda.stream(self._capture_stream):
                for _ in range(WARMUP_RUNS):
                    _through(modules, x)
                self._capture_stream.synchronize()
                # torch.cuda.graph would do the same after collecting all garbage, which takes longer than the capture.
                # Graphs run one after another and what they give is copied out at once, so they share one memory pool.
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    y = _through(modules, x)
                except BaseException:
                    with suppress(RuntimeError):  # it says that the capture has failed, and so leaves the stream usable
                        graph.capture_end()
                    raise
                graph.capture_end()
            path = TorchPath(self, graph, x, y)
            self._paths.add(path)
        return path

    def replay(self, path: TorchPath, x: Tensor) -> Tensor:
        """For :class:`TorchPath`."""
        with self._queued("path"):
            path.x.copy_(x)
            path.graph.replay()
            return path.y.clone()

    def forget(self, path: TorchPath) -> None:
        """For :class:`TorchPath`: it is closed."""
        self._paths.discard(path)

    def close(self) -> None:
        import torch

        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._stream.synchronize()
            for path in list(self._paths):
                path.close()
            self._modules = {}
            torch.cuda.empty_cache()

    def _numbers(self, rows: Rows) -> Tensor:
        import torch

        return torch.from_numpy(rows.astype(np.int64)).pin_memory().to(self._device, non_blocking=True)

    def _write(self, x: Tensor, rows: Rows, y: Tensor) -> None:
        span = row_span(rows)
        if span is not None:
            x[span] = y
        else:
            x.index_copy_(0, self._numbers(rows), y)

    @contextmanager
    def _queued(self, what: str) -> Iterator[None]:
        """Under the lock, on the session's stream, without gradients."""
        import torch

        with self._lock:
            if self._closed:
                raise closed_error("torch")
            with torch.inference_mode(), torch.cuda.stream(self._stream), _reported(what):
                yield


class TorchPath:
    """A path of one batch size as a graph on a static input; see ``runtime/graph_executor.py``."""

    def __init__(self, session: TorchCudaSession, graph: Any, x: Tensor, y: Tensor) -> None:
        self._session, self.graph, self.x, self.y = session, graph, x, y

    def run(self, x: Tensor) -> Tensor:
        """The path's output for ``x``, queued."""
        return self._session.replay(self, x)

    def close(self) -> None:
        """Destroy the graph."""
        self._session.forget(self)
        self.graph.reset()


def _through(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _adopted(array: Any) -> Tensor:
    """The array's memory as a tensor: by DLPack, which orders the streams, else by ``__cuda_array_interface__``."""
    import torch
    from torch.utils.dlpack import from_dlpack

    try:
        return from_dlpack(array) if hasattr(array, "__dlpack__") else torch.as_tensor(array, device="cuda")
    except (BufferError, TypeError, ValueError) as error:
        remedy = "pass array.detach()" if "grad" in str(error) else None
        raise InputError(f"images: not to be read by torch ({_first_line(error)})", remedy=remedy) from error


def _checked(tensor: Tensor, shape: tuple[int, ...], device: Any) -> Tensor:
    import torch

    expected = f"float32 (N, {', '.join(map(str, shape))}) on {device}"
    if tensor.device != device:
        raise InputError("images: on another device", got=tensor.device, expected=device)
    if tensor.dtype != torch.float32:
        raise InputError("images: wrong dtype", got=tensor.dtype, expected=expected)
    if tuple(tensor.shape[1:]) != shape or len(tensor) == 0:
        raise InputError("images: wrong shape", got=tuple(tensor.shape), expected=expected)
    return tensor


@contextmanager
def _reported(what: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "use a smaller batch, or free memory of other processes"
        raise BackendError(f"{what} [torch]: out of device memory ({_first_line(error)})", remedy=remedy) from error
    except RuntimeError as error:
        raise BackendError(f"{what} [torch]: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
