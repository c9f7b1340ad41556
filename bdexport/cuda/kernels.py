"""The two kernels of our own, compiled at run time: rows of a batch gathered and scattered by index."""

from __future__ import annotations

from typing import Any

from bdexport.errors import BackendError

GATHER, SCATTER = "gather_rows", "scatter_rows"
THREADS = 256
MAX_ROWS = 65_535  # blocks in the grid's y direction
# One block row per image; 16 bytes per thread and step, where the rows' length allows it.
SOURCE = """
template <typename Word>
__device__ void move(char* target, const char* source, long long words) {
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long word = (long long)blockIdx.x * blockDim.x + threadIdx.x; word < words; word += step)
        ((Word*)target)[word] = ((const Word*)source)[word];
}

__device__ void move_row(char* target, const char* source, long long bytes) {
    if (((unsigned long long)target | (unsigned long long)source | (unsigned long long)bytes) % 16 == 0)
        move<int4>(target, source, bytes / 16);
    else
        move<int>(target, source, bytes / 4);
}

extern "C" __global__ void gather_rows(char* target, const char* source, const int* rows, long long bytes) {
    move_row(target + blockIdx.y * bytes, source + rows[blockIdx.y] * bytes, bytes);
}

extern "C" __global__ void scatter_rows(char* target, const char* source, const int* rows, long long bytes) {
    move_row(target + rows[blockIdx.y] * bytes, source + blockIdx.y * bytes, bytes);
}
"""


def grid_width(row_bytes: int) -> int:
    """Blocks per row: each thread moves about four words of 16 bytes."""
    return max(1, min(64, -(-row_bytes // (THREADS * 64))))


def compiled(source: str, capability: tuple[int, int], name: str = "bdexport.cu") -> bytes:
    """Machine code for that GPU, or PTX where the compiler does not know it yet, by NVRTC; needs no GPU.

    Machine code rather than PTX, since a driver refuses PTX of a compiler that is newer than itself. Raises
    BackendError, quoting the compiler.
    """
    nvrtc = _nvrtc()
    known = [
        arch for arch in _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs()) if arch <= 10 * capability[0] + capability[1]
    ]
    if not known:
        what = f"cuda: NVRTC has no target for compute capability {capability[0]}.{capability[1]}"
        raise BackendError(what, remedy="install the nvidia-cuda-nvrtc of an older CUDA version")
    exact = known[-1] == 10 * capability[0] + capability[1]
    option = f"--gpu-architecture={'sm' if exact else 'compute'}_{known[-1]}".encode()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, 1, [option])
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            said = " ".join(log.rstrip(b"\0").decode(errors="replace").split())
            raise BackendError(f"cuda: NVRTC cannot compile {name} ({said or code.name})")
        size, read = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if exact else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        image = bytes(_checked(nvrtc, size(program)))
        _checked(nvrtc, read(program, image))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return image


def _nvrtc() -> Any:
    remedy = "pip install nvidia-cuda-nvrtc of the driver's CUDA version"
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"cuda: NVRTC cannot be loaded ({' '.join(str(error).split())})", remedy=remedy) from error
    return nvrtc


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    code, *values = result
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"cuda: NVRTC failed ({code.name})")
    return values[0] if values else None
