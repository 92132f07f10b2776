"""CUDA's driver calls that the scheduler thread makes for each request: copy, record, wait.

Through torch each of these costs 5 to 20 us of Python (views, stream contexts, event objects)
and there are nine a request, the gather's launch included; called in the driver itself, 1 to 5 us.
In caches that SGLang's own work has filled since the last request, code costs by its size, so
nothing lies between but ctypes (``bench/gpu.py`` shows what they take there). Streams are torch's,
by their handles; memory is torch's, by its addresses, so whoever calls keeps the tensors alive
until the stream is past the copy.

Every call lets go of the interpreter: one that waits, for room in a full queue, must not keep the
callback of a stream from running that the queue waits for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from .errors import DeviceError

_DISABLE_TIMING, _BLOCKING_SYNC = 2, 1  # CUevent_flags
_HANDLE, _FLAGS, _BYTES = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t

try:
    _driver: ctypes.CDLL | None = ctypes.CDLL("libcuda.so.1")
except OSError:
    _driver = None  # nothing of this is called then, but parts of it are imported


def _function(name: str, *arguments: Any) -> Callable[..., int]:
    if _driver is None:
        return _missing
    function = getattr(_driver, name)
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function


def _missing(*_: Any) -> int:
    raise DeviceError("libcuda.so.1 cannot be loaded: there is no CUDA driver here")


_create = _function("cuEventCreate", ctypes.POINTER(_HANDLE), _FLAGS)
_destroy = _function("cuEventDestroy_v2", _HANDLE)
_record = _function("cuEventRecord", _HANDLE, _HANDLE)
_hold_back = _function("cuStreamWaitEvent", _HANDLE, _HANDLE, _FLAGS)
_synchronize = _function("cuEventSynchronize", _HANDLE)
_copy = _function("cuMemcpyAsync", _HANDLE, _HANDLE, _BYTES, _HANDLE)
_error_name = _function("cuGetErrorName", ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))


def _refused(code: int, what: str) -> DeviceError:
    name = ctypes.c_char_p()
    _error_name(code, ctypes.byref(name))
    return DeviceError(f"{what}: {(name.value or b'unknown').decode()} ({code})")


class Event:
    """A point in a stream, without timing. Recording it again moves it on.

    Who waited for it before goes by the record that was the latest then.

    Parameters
    ----------
    blocking
        ``synchronize`` sleeps instead of spinning.
    """

    __slots__ = ("_handle",)

    def __init__(self, *, blocking: bool = False) -> None:
        handle = _HANDLE()
        code = _create(ctypes.byref(handle), _DISABLE_TIMING | (_BLOCKING_SYNC if blocking else 0))
        if code:
            raise _refused(code, "cuEventCreate")
        self._handle = handle.value

    def __del__(self, destroy: Callable[..., int] = _destroy) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None:
            destroy(handle)  # its waiters keep what they waited for

    def record(self, stream: int) -> None:
        code = _record(self._handle, stream)
        if code:
            raise _refused(code, "cuEventRecord")

    def hold_back(self, stream: int) -> None:
        """Later work of the stream comes after what was recorded last."""
        code = _hold_back(stream, self._handle, 0)
        if code:
            raise _refused(code, "cuStreamWaitEvent")

    def synchronize(self) -> None:
        """Wait on the host."""
        code = _synchronize(self._handle)
        if code:
            raise _refused(code, "cuEventSynchronize")


def copy(target: int, source: int, nbytes: int, stream: int) -> None:
    """Copy between two addresses, device or page-locked, in stream order."""
    code = _copy(target, source, nbytes, stream)
    if code:
        raise _refused(code, "cuMemcpyAsync")
