"""The two calls of the CUDA runtime that are needed here and that torch does not bind.

They are looked up in the library that torch has loaded already, never loaded anew: a second
copy of the runtime would have errors and modes of its own. A torch that links the runtime
statically, or was built without CUDA, has no such library, and then both do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

import torch

_CAPTURE_MODE_RELAXED = 2  # cudaStreamCaptureModeRelaxed


@functools.cache
def _library() -> ctypes.CDLL | None:
    if torch.version.cuda is None:
        return None
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None


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
