"""Child processes of the crash campaign: forked, so that 2,000 lives cost seconds to start.

The campaign's own process opens no arena, so a fork of it has nothing of the product's. Every
child ends with the campaign, whatever ends that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def start(main: Callable[[], None]) -> int:
    """Run ``main`` in a child process; returns its pid. An exception ends it with status 1."""
    parent = os.getpid()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        end_with(parent)
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, whatever ends that."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def kill(pid: int) -> None:
    """SIGKILL a child that nobody has waited for, so the pid is still its own."""
    os.kill(pid, signal.SIGKILL)


def ended(pid: int) -> int | None:
    """Exit status of a child, negative for a signal; None while it lives."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def end(pid: int) -> None:
    """Kill a child if it lives, and wait for it."""
    with suppress(ChildProcessError, ProcessLookupError):
        kill(pid)
        os.waitpid(pid, 0)
