"""The interpreter's lock, between the scheduler thread and the bridge's own threads.

Problem
    A thread that wants the lock waits for ``sys.getswitchinterval()``, 5 ms, before the one that
    has it must let go. Sealing a record gives the lock up several times (a pause, a lock of the
    kernel's, NumPy's loops of more than 500 items), and an idle scheduler thread looks for work in
    a loop that hardly ever does. So each of the records that finish together, the engine's last,
    took several times 5 ms to be sealed, one after the other.

Approach
    While the engine runs forwards, its scheduler thread comes first: it waits for the GPU in every
    step, and that is time enough. While it runs none, its loop is worth nothing, and ``insisting``
    makes it let go soon.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SOON = 50e-6  # seconds

_changing = threading.Lock()
_insistent = 0
_usual = 0.0


@contextmanager
def insisting(idle: bool) -> Iterator[None]:
    """While this lasts a thread that waits for the interpreter gets it soon, if ``idle``.

    Several threads may insist at once; the last to end puts back what the first has found.
    """
    if not idle:
        yield
        return
    _change(1)
    try:
        yield
    finally:
        _change(-1)


def _change(by: int) -> None:
    global _insistent, _usual
    with _changing:
        if not _insistent:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(_SOON)
        _insistent += by
        if not _insistent:
            sys.setswitchinterval(_usual)
