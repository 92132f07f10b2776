"""The calls of the CUDA runtime that are needed here and that torch does not bind.

They are looked up in the library that torch has loaded already, never loaded anew: a second
copy of the runtime would have errors and modes of its own. A torch that links the runtime
statically, or was built without CUDA, has no such library, and then none of them is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

_CAPTURE_MODE_RELAXED = 2  # cudaStreamCaptureModeRelaxed
_TO_DEVICE = 1  # cudaMemcpyHostToDevice


@functools.cache
def _library() -> ctypes.CDLL | None:
    if torch.version.cuda is None:
        return None
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None


@functools.cache
def _copies() -> tuple[Any, Any] | None:
    library = _library()
    if library is None:
        return None
    one, rows = library.cudaMemcpyAsync, library.cudaMemcpy2DAsync
    address, size, stream = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    one.argtypes = address, address, size, ctypes.c_int, stream
    rows.argtypes = address, size, address, size, size, size, ctypes.c_int, stream
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return one, rows


def can_copy() -> bool:
    """Whether ``copy_to_device`` and ``copy_rows_to_device`` are there."""
    return _copies() is not None


def copy_to_device(target: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy from page-locked memory to the current device, by their addresses.

    Through torch it takes two tensors more, and a question to the driver about each.

    Parameters
    ----------
    stream
        A handle of one of the current device's streams.

    Raises
    ------
    RuntimeError
        What the runtime says, an error of earlier work on the device included.
    """
    copy, _ = _copies()  # type: ignore[misc]
    code = copy(target, source, nbytes, _TO_DEVICE, stream)
    if code:
        _refused(code, nbytes)


def copy_rows_to_device(
    target: int,
    target_pitch: int,
    source: int,
    source_pitch: int,
    nbytes: int,
    rows: int,
    stream: int,
) -> None:
    """The same for the first ``nbytes`` of each row; from one row to the next it is a pitch."""
    _, copy = _copies()  # type: ignore[misc]
    code = copy(target, target_pitch, source, source_pitch, nbytes, rows, _TO_DEVICE, stream)
    if code:
        _refused(code, nbytes * rows)


def _refused(code: int, nbytes: int) -> NoReturn:
    clear_error()
    said = _library().cudaGetErrorString(code).decode()  # type: ignore[union-attr]
    raise RuntimeError(f"a copy of {nbytes} bytes to the GPU was refused: {said} ({code})")


def current_stream(device: int) -> int:
    """Handle of the calling thread's current stream: torch's, without the object around it."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def clear_error() -> None:
    """Forget this thread's last CUDA error.

    A call that failed and was dealt with leaves it behind, and torch would report it after
    this thread's next kernel launch, as if that had failed.
    """
    library = _library()
    if library is not None:
        library.cudaGetLastError()


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Let this thread make CUDA calls while another one captures a CUDA graph.

    torch captures in the global mode by default. A call that might synchronise (registering
    memory, waiting for an event), made by any thread meanwhile, then fails and invalidates the
    capture, though it has nothing to do with the captured stream. The mode is the calling
    thread's own and is put back.
    """
    library = _library()
    if library is None:
        yield
        return
    mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
    library.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # swaps
    try:
        yield
    finally:
        library.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
