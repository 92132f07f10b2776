"""Child processes that look at SGLang from outside: started together, asked one by one.

Each imports SGLang by itself (10 s), so they run side by side.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A child starts from what a user has: no platform, no arena, no list of plugins.
CLEARED = ("SGLANG_PLATFORM", "SGLANG_PLUGINS")


@dataclass(frozen=True, slots=True)
class Done:
    """What a child printed, and its exit status."""

    status: int
    output: str
    errors: str


class Child:
    """One child process; ``done`` waits for its end."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in CLEARED and not name.startswith("SHMROUTE_")
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *argv],
            env={**kept, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._done: Done | None = None

    def done(self) -> Done:
        if self._done is None:
            output, errors = self._process.communicate(timeout=240)
            self._done = Done(self._process.returncode, output, errors)
        return self._done

    def end(self) -> None:
        if self._done is None:
            self._process.kill()
            self._process.communicate()
