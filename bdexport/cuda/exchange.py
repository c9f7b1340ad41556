"""Arrays on the device from and for other libraries, without a copy: DLPack and ``__cuda_array_interface__``.

DLPack is tried first, since its protocol orders the two sides' streams. The structures are those of dlpack.h (ABI
version 0, which every producer still gives to consumers that do not ask for more).
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

from bdexport.cuda.base import Cuda, Stream
from bdexport.errors import InputError

CUDA_DEVICE, CUDA_HOST, CUDA_MANAGED = 2, 3, 13  # DLDeviceType
FLOAT, FLOAT_BITS = 2, 32  # DLDataTypeCode kDLFloat
CAPSULE, USED_CAPSULE = b"dltensor", b"used_dltensor"
LEGACY_STREAM = 1  # the default stream's handle in both protocols


class _DLDevice(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (
    ("dl_tensor", _DLTensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
)
_CapsuleDestructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _CapsuleDestructor)
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
# The same two functions for a capsule that is being destroyed: no reference may be taken to it any more.
_dying_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


# ---- in -----------------------------------------------------------------------------------------------------------


def is_device_array(array: Any) -> bool:
    """Whether ``array`` lies in a GPU's memory, as far as it says so itself; numpy arrays and lists do not.

    Raises :class:`InputError` where its protocol raises or says what makes no sense.
    """
    try:
        if hasattr(array, "__dlpack_device__"):
            return int(array.__dlpack_device__()[0]) in (CUDA_DEVICE, CUDA_MANAGED)
    except Exception as error:  # code of the caller's object: anything may come
        said = " ".join(str(error).split())[:200]
        told = f"{type(array).__name__} whose __dlpack_device__ raises {type(error).__name__}: {said}"
        raise InputError("images: where they lie cannot be told", got=told, remedy="pass a numpy array") from error
    return hasattr(type(array), "__cuda_array_interface__")


def adopt(array: Any, shape: tuple[int, ...], cuda: Cuda, stream: Stream) -> tuple[int, tuple[int, ...], object]:
    """(address, shape, what keeps the memory alive) of a float32 (N, *shape) C-contiguous array on ``cuda``'s device.

    What its producer has queued runs before what is queued on ``stream`` from now on, as far as the producer tells its
    stream. Raises :class:`InputError` for another device, dtype, shape or layout.
    """
    if hasattr(array, "__dlpack__"):
        return _from_dlpack(array, shape, cuda, stream)
    return _from_interface(array, shape, cuda, stream)


def _from_dlpack(array: Any, shape: tuple[int, ...], cuda: Cuda, stream: Stream) -> tuple[int, tuple[int, ...], object]:
    _check_device(int(array.__dlpack_device__()[1]), cuda)
    try:
        capsule = array.__dlpack__(stream=stream.handle)
        managed = _DLManagedTensor.from_address(_pointer_of(capsule, CAPSULE))
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        remedy = "pass array.detach()" if "grad" in str(error) else None
        raise InputError(f"images: no DLPack of them ({' '.join(str(error).split())})", remedy=remedy) from error
    _rename(capsule, USED_CAPSULE)
    memory = _Imported(managed)
    tensor = managed.dl_tensor
    found = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    strides = tuple(tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else None
    kind = (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
    _check_layout(found, strides, kind == (FLOAT, FLOAT_BITS, 1), f"DLPack type {kind}", shape)
    return int(tensor.data or 0) + int(tensor.byte_offset), found, memory


class _Imported:
    """Somebody's DLPack tensor, given back when this object goes. The capsule itself is not needed any more."""

    def __init__(self, managed: _DLManagedTensor) -> None:
        self._managed = managed

    def __del__(self) -> None:
        if self._managed.deleter:
            self._managed.deleter(ctypes.byref(self._managed))


def _from_interface(
    array: Any, shape: tuple[int, ...], cuda: Cuda, stream: Stream
) -> tuple[int, tuple[int, ...], object]:
    interface = array.__cuda_array_interface__
    found = tuple(int(size) for size in interface["shape"])
    strides = interface.get("strides")
    steps = None if strides is None else tuple(int(step) // 4 for step in strides)
    kind = str(interface["typestr"])
    _check_layout(found, steps, kind in ("<f4", "=f4"), kind, shape)
    producer = interface.get("stream")
    if producer is not None and int(producer) != stream.handle:
        cuda.order(int(producer), stream.handle)
    return int(interface["data"][0]), found, array


def _check_device(device: int, cuda: Cuda) -> None:
    if device != cuda.device:
        remedy = f"load the bundle with device='cuda:{device}', or copy the images"
        raise InputError(
            "images: on another device", got=f"cuda:{device}", expected=f"cuda:{cuda.device}", remedy=remedy
        )


def _check_layout(
    found: tuple[int, ...], strides: tuple[int, ...] | None, is_float: bool, kind: str, shape: tuple[int, ...]
) -> None:
    expected = f"float32 (N, {', '.join(map(str, shape))}) on the device, already preprocessed"
    if not is_float:
        raise InputError("images: wrong dtype", got=kind, expected=expected)
    if len(found) != len(shape) + 1 or found[1:] != shape or found[0] == 0:
        raise InputError("images: wrong shape", got=found, expected=expected)
    if strides is not None and not _contiguous(found, strides):
        remedy = "pass array.contiguous() (torch) or ascontiguousarray(array) (CuPy)"
        raise InputError("images: not C-contiguous", got=f"strides {strides}", remedy=remedy)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Strides in elements; an axis of length 1 may have any."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


# ---- out ----------------------------------------------------------------------------------------------------------


class DeviceArray:
    """float32 ``shape`` on the device, for torch, CuPy, PyCUDA and others: ``torch.from_dlpack(array)``.

    Work that fills it is queued on the session's stream. A consumer that passes its stream (``__dlpack__`` does it by
    itself) waits for that work on the device; so does one that honours the interface's ``stream``. The memory is kept
    by whoever holds the array or what was made from it. It may be used again by the session as soon as all of these are
    gone, so let them go after your stream is done with it, or give the session your stream.
    """

    dtype = "float32"

    def __init__(self, pointer: int, shape: tuple[int, ...], memory: object, cuda: Cuda, stream: Stream) -> None:
        self.pointer, self.shape = pointer, shape
        self._memory, self._cuda, self._stream = memory, cuda, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the interface."""
        data = (self.pointer, False)
        return {"shape": self.shape, "typestr": "<f4", "data": data, "version": 3, "stream": self._stream.handle}

    def __dlpack_device__(self) -> tuple[int, int]:
        """(2, the device's ordinal): a CUDA device."""
        return CUDA_DEVICE, self._cuda.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule "dltensor". ``stream``: the consumer's, None for the default one, -1 for no ordering."""
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"this array is on {self.__dlpack_device__()}, not on {tuple(dl_device)}")
        if copy:
            raise BufferError("this array makes no copies")
        consumer = LEGACY_STREAM if stream is None else int(stream)
        if consumer not in (-1, self._stream.handle):
            self._cuda.order(self._stream.handle, consumer)
        return _capsule(self)


_exported: dict[int, tuple[Any, ...]] = {}  # what C code holds, by the address of its managed tensor


def _capsule(array: DeviceArray) -> Any:
    """A capsule on the array's memory, which ``_exported`` keeps alive until the consumer calls the deleter."""
    rank = len(array.shape)
    shape = (ctypes.c_int64 * rank)(*array.shape)
    steps = [math.prod(array.shape[axis + 1 :]) for axis in range(rank)]
    strides = (ctypes.c_int64 * rank)(*steps)
    managed = _DLManagedTensor()
    managed.dl_tensor.data = array.pointer
    managed.dl_tensor.device = _DLDevice(*array.__dlpack_device__())
    managed.dl_tensor.ndim = rank
    managed.dl_tensor.dtype = _DLDataType(FLOAT, FLOAT_BITS, 1)
    managed.dl_tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    managed.dl_tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _deleter
    address = ctypes.addressof(managed)
    _exported[address] = (managed, shape, strides, array)
    return _new_capsule(address, CAPSULE, _capsule_destructor)


def _forget(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _destroy_capsule(capsule: int) -> None:
    """A capsule that nobody has taken over is the last owner of its tensor."""
    if _dying_is_valid(capsule, CAPSULE):
        _exported.pop(_dying_pointer(capsule, CAPSULE), None)


# C code holds their addresses for as long as the process lives.
_deleter, _capsule_destructor = _Deleter(_forget), _CapsuleDestructor(_destroy_capsule)
