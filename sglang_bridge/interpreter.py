"""The interpreter's lock, between the scheduler thread and the bridge's own threads.

Problem
    A thread that wants the lock waits for ``sys.getswitchinterval()``, 5 ms, before the one that
    has it must let go. Sealing a record gives the lock up several times (a pause, a lock of the
    kernel's, NumPy's loops of more than 500 items), and an idle scheduler thread looks for work in
    a loop that hardly ever does. So each of the records that finish together, the engine's last,
    took several times 5 ms to be sealed, one after the other.

Approach
    While the engine runs forwards, its scheduler thread comes first: it waits for the GPU in every
    step, and that is time enough. While it runs none, its loop is worth nothing, and ``Insistence``
    makes it let go soon.

    It lasts from record to record. Ended after each, it left a gap: the scheduler thread, which
    waits no longer than that either, asked for the lock back at that very moment, and the next
    record began with the usual 5 ms (160 records that finished together were open after 8 to
    1,050 ms, an H200 at f61b9ec).
"""

from __future__ import annotations

import sys
import threading

_SOON = 50e-6  # seconds

_changing = threading.Lock()
_insistent = 0
_usual = 0.0


class Insistence:
    """A thread's stretch of work, as a context manager.

    While the engine is ``idle`` by the last ``follow``, a thread that waits for the interpreter
    gets it soon. Several threads may insist at once; the last to end puts back what the first has
    found.
    """

    def __init__(self) -> None:
        self._insists = False

    def follow(self, idle: bool) -> None:
        """The engine is idle, or is not, from here on."""
        if idle != self._insists:
            self._insists = idle
            _change(1 if idle else -1)

    def __enter__(self) -> Insistence:
        return self

    def __exit__(self, *_: object) -> None:
        self.follow(False)


def _change(by: int) -> None:
    global _insistent, _usual
    with _changing:
        if not _insistent:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(_SOON)
        _insistent += by
        if not _insistent:
            sys.setswitchinterval(_usual)
