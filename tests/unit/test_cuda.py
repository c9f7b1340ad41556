"""Opening CUDA where there is none, the kernels' compilation, callers' streams; what can be said without a GPU."""

from __future__ import annotations

import importlib.util
import inspect
from types import SimpleNamespace

import pytest

import bdexport.cuda
from bdexport.cuda import cuda_ordinal, open_cuda, why_no_cuda
from bdexport.cuda.driver_api import check_device, driver_api, out_of_memory, start, stream_handle
from bdexport.cuda.kernels import GATHER, SCATTER, SOURCE, compiled, grid_width
from bdexport.errors import BackendError, UsageError

# Names and number of arguments of the driver calls that the bindings module makes.
CALLS = {
    "cuInit": 1, "cuDriverGetVersion": 0, "cuDeviceGetCount": 0, "cuDeviceGet": 1, "cuDeviceGetName": 2,
    "cuDeviceGetAttribute": 2, "cuDevicePrimaryCtxRetain": 1, "cuCtxSetCurrent": 1, "cuMemGetInfo": 0, "cuMemAlloc": 1,
    "cuMemFree": 1, "cuMemHostAlloc": 2, "cuMemFreeHost": 1, "cuStreamCreate": 1, "cuStreamDestroy": 1,
    "cuStreamSynchronize": 1, "cuStreamWaitEvent": 3, "cuEventCreate": 1, "cuEventRecord": 2, "cuEventSynchronize": 1,
    "cuEventQuery": 1, "cuEventElapsedTime": 2, "cuEventDestroy": 1, "cuMemcpyHtoDAsync": 4,
    "cuMemcpyDtoHAsync": 4, "cuMemcpyDtoDAsync": 4,
    "cuStreamBeginCapture": 2, "cuStreamEndCapture": 1, "cuGraphInstantiate": 2, "cuGraphUpload": 2, "cuGraphLaunch": 2,
    "cuGraphExecDestroy": 1, "cuGraphDestroy": 1, "cuModuleLoadData": 1, "cuModuleUnload": 1, "cuModuleGetFunction": 2,
    "cuLaunchKernel": 11, "cuGetErrorString": 1,
}  # fmt: skip
has_bindings = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
needs_bindings = pytest.mark.skipif(not has_bindings, reason="cuda-python is not installed")


def without_gpu() -> None:
    if why_no_cuda() is None:
        pytest.skip("this machine has a GPU")


@needs_bindings
def test_no_driver_is_said_with_the_remedy() -> None:
    """Oracle: the error's text; cuInit itself fails here."""
    without_gpu()
    with pytest.raises(BackendError, match=r"cuda: (no NVIDIA driver|the driver finds no GPU|start failed)") as caught:
        open_cuda("cuda-python")
    assert caught.value.remedy


def test_no_binding_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the install line."""
    monkeypatch.setattr(bdexport.cuda, "_installed", lambda module: False)
    with pytest.raises(BackendError, match=r"neither PyCUDA nor cuda-python.*pip install .cuda-python>="):
        open_cuda()


def test_pycuda_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the choice and its reason, for every pair of installed bindings."""
    chosen: list[tuple[str, str]] = []
    monkeypatch.setattr(bdexport.cuda, "_opened", lambda name, device, note: chosen.append((name, note)))
    for installed, foreign in (
        ({"pycuda", "cuda.bindings"}, False),
        ({"pycuda", "cuda.bindings"}, True),
        ({"pycuda"}, True),
        ({"cuda.bindings"}, False),
    ):
        monkeypatch.setattr(bdexport.cuda, "_installed", installed.__contains__)
        open_cuda(foreign_stream=foreign)
    assert [name for name, _ in chosen] == ["pycuda", "cuda-python", "pycuda", "cuda-python"]
    assert chosen[3][1] == "cuda-python: PyCUDA is not installed"
    with pytest.raises(UsageError, match="cuda binding"):
        open_cuda("cupy")


def test_a_driver_that_is_too_old_is_named() -> None:
    """Oracle: both versions in the text."""
    code = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_NO_DEVICE=100)
    old = SimpleNamespace(CUresult=code, cuInit=lambda flags: (0,), cuDriverGetVersion=lambda: (0, 11080))
    with pytest.raises(BackendError, match=r"driver too old: got 11\.8, expected CUDA 12\.0 or newer; update"):
        start(old)
    none = SimpleNamespace(CUresult=code, cuInit=lambda flags: (100,))
    with pytest.raises(BackendError, match="the driver finds no GPU"):
        start(none)


def test_ordinals() -> None:
    """Oracle: the table."""
    assert [cuda_ordinal(name) for name in ("cuda", "cuda:0", "cuda:7")] == [0, 0, 7]
    assert [cuda_ordinal(name) for name in ("cpu", "cuda:", "cuda:-1", "cuda:x", "gpu", "")] == [None] * 6
    check_device(1, 2)
    with pytest.raises(BackendError, match="got cuda:2, expected cuda:0 to cuda:1"):
        check_device(2, 2)


def test_out_of_memory_names_both_sizes() -> None:
    """Oracle: the numbers in MiB."""
    text = str(out_of_memory("device", 3 << 20, (1 << 20, 80 << 30)))
    assert "3.0 MiB asked for, 1.0 of 81920.0 MiB free" in text


class Protocol:
    """A stream as the protocol has it."""

    def __init__(self, version: int, handle: int) -> None:
        self._pair = (version, handle)

    def __cuda_stream__(self) -> tuple[int, int]:
        return self._pair


def test_handles_of_callers_streams() -> None:
    """Oracle: the handle, from the protocol and from each library's own attribute."""
    assert stream_handle(12345) == 12345
    assert stream_handle(Protocol(0, 777)) == 777
    for name in ("cuda_stream", "ptr", "handle"):
        assert stream_handle(SimpleNamespace(**{name: 55})) == 55


@pytest.mark.parametrize("stream", [0, 1, 2, True, "5", None, object(), Protocol(1, 777), Protocol(0, 0), -1])
def test_other_streams_are_refused(stream: object) -> None:
    """Oracle: UsageError that begins with the argument's name."""
    with pytest.raises(UsageError, match=r"^stream"):
        stream_handle(stream)


@needs_bindings
def test_driver_calls_are_what_the_bindings_have() -> None:
    """Oracle: the signatures of the installed cuda-bindings."""
    api = driver_api()
    for name, count in CALLS.items():
        first = inspect.getdoc(getattr(api, name)).splitlines()[0]  # type: ignore[union-attr]
        arguments = first.partition("(")[2].rpartition(")")[0]
        assert len([part for part in arguments.split(",") if part.strip()]) == count, first
    for path in (
        *("CUresult.CUDA_SUCCESS", "CUresult.CUDA_ERROR_OUT_OF_MEMORY", "CUresult.CUDA_ERROR_NO_DEVICE"),
        "CUresult.CUDA_ERROR_NOT_READY",
        *("CUstream_flags.CU_STREAM_NON_BLOCKING", "CUevent_flags.CU_EVENT_DISABLE_TIMING"),
        "CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL",
        "CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
    ):
        group, _, member = path.partition(".")
        assert hasattr(getattr(api, group), member), path


@needs_bindings
def test_the_kernels_compile() -> None:
    """Oracle: NVRTC, which needs no GPU: machine code for a GPU that it knows, PTX for one that it does not."""
    try:
        image = compiled(SOURCE, (9, 0))
    except BackendError as error:
        if "cannot be loaded" not in str(error):
            raise
        pytest.skip(str(error))
    assert image.startswith(b"\x7fELF")
    assert GATHER.encode() in image
    assert SCATTER.encode() in image
    assert b".target sm_90" in compiled(SOURCE, (9, 9))
    with pytest.raises(BackendError, match="NVRTC cannot compile bad"):
        compiled("nonsense", (9, 0), "bad")


def test_grids_fit_the_rows() -> None:
    """Property: at least one block, never more than 64."""
    assert [grid_width(size) for size in (4, 16384, 65536, 1 << 30)] == [1, 1, 4, 64]
