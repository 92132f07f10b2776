"""CUDA's driver calls that the scheduler thread makes for each request: copy, record, wait.

Through torch each of these costs 5 to 20 us of Python (views, stream contexts, event objects)
and there are four a request; through the driver's own binding, which torch depends on, 1 to
2 us. Streams are torch's, by their handles; memory is torch's, by its addresses, so whoever
calls keeps the tensors alive until the stream is past the copy.
"""

from __future__ import annotations

from typing import Any

import torch
from cuda.bindings import driver

from .errors import DeviceError

_DONE = driver.CUresult.CUDA_SUCCESS
_FLAGS = driver.CUevent_flags


def _check(code: Any, what: str) -> None:
    if code != _DONE:
        raise DeviceError(f"{what}: {code.name} ({int(code)})")


class Event:
    """A point in a stream, without timing. Recording it again moves it on.

    Who waited for it before goes by the record that was the latest then.

    Parameters
    ----------
    blocking
        ``synchronize`` sleeps instead of spinning.
    """

    def __init__(self, *, blocking: bool = False) -> None:
        flags = _FLAGS.CU_EVENT_DISABLE_TIMING
        if blocking:
            flags |= _FLAGS.CU_EVENT_BLOCKING_SYNC
        code, self._handle = driver.cuEventCreate(int(flags))
        _check(code, "cuEventCreate")

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None:
            driver.cuEventDestroy(handle)  # its waiters keep what they waited for

    def record(self, stream: int) -> None:
        _check(driver.cuEventRecord(self._handle, stream)[0], "cuEventRecord")

    def hold_back(self, stream: int) -> None:
        """Later work of the stream comes after what was recorded last."""
        _check(driver.cuStreamWaitEvent(stream, self._handle, 0)[0], "cuStreamWaitEvent")

    def synchronize(self) -> None:
        """Wait on the host, without the interpreter's lock."""
        _check(driver.cuEventSynchronize(self._handle)[0], "cuEventSynchronize")


def current_stream(device: int) -> int:
    """Handle of the calling thread's current stream, without torch's object around it."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def copy(target: int, source: int, nbytes: int, stream: int) -> None:
    """Copy between two addresses, device or page-locked, in stream order."""
    _check(driver.cuMemcpyAsync(target, source, nbytes, stream)[0], "cuMemcpyAsync")
