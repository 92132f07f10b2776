"""Child processes that look at SGLang from outside. Each imports it by itself (10 s)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# A child starts from what a user has: no platform, no arena, no list of plugins.
CLEARED = ("SGLANG_PLATFORM", "SGLANG_PLUGINS")
ON_CPU = {"SGLANG_PLATFORM": "shmroute_cpu"}


class Child:
    """One child process, which works by itself; see ``processes``."""

    def __init__(self, folder: Path, *argv: str, **environment: str) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in CLEARED and not name.startswith("SHMROUTE_")
        }
        self._output, self._errors = folder / "output", folder / "errors"
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *argv],
                env={**kept, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )

    def is_done(self) -> bool:
        return self._process.poll() is not None

    @property
    def said(self) -> str:
        return self._output.read_text() + self._errors.read_text()

    def output(self) -> str:
        """What it printed, when it ended well."""
        assert self._process.wait() == 0, self.said
        return self._output.read_text()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
