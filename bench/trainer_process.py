"""The demo's end of the pipe to ``demo_trainer.py``, which runs as a process of its own.

The pipe carries rids, for the comparison also rows as the native path delivers them; routes
out of the arena never travel through it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

SCRIPT = Path(__file__).with_name("demo_trainer.py")


class TrainerError(RuntimeError):
    """The trainer process ended, or could not read a record."""


class TrainerProcess:
    """A ``python bench/demo_trainer.py ARENA`` and one answer for each message to it."""

    def __init__(self, arena: str, log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                [sys.executable, str(SCRIPT), arena],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def read(self, rid: str) -> dict[str, Any]:
        """Have it read a request's routes; it is given nothing but the rid."""
        return self._ask({"read": rid})

    def compare(self, rid: str, pickled_rows: bytes) -> dict[str, Any]:
        """Hand over a request's native rows, to be compared with those it has read."""
        return self._ask({"native": rid, "bytes": len(pickled_rows)}, pickled_rows)

    def experts(self) -> dict[str, Any]:
        """Which part of the (layer, expert) pairs was used."""
        return self._ask({"experts": True})

    def _ask(self, message: dict[str, Any], payload: bytes = b"") -> dict[str, Any]:
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps(message).encode() + b"\n" + payload)
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise TrainerError(f"the trainer process ended (exit {self._child.wait()}):\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TrainerError(f"the trainer could not read {message}: {answer['error']}")
        return answer

    def stop(self) -> None:
        """End it; calling it twice is harmless."""
        stdin, stdout = self._pipes()
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        stdout.close()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        return self._child.stdin, self._child.stdout
