"""Benchmarks as processes of their own, of which nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
SHM = Path("/dev/shm")


class Bench(subprocess.Popen[str]):
    """A script of ``bench`` with these arguments; it calls its arenas ``arena`` and its pid."""

    def __init__(
        self, script: str, arena: str, *arguments: str, output: int | IO[str] = subprocess.PIPE
    ) -> None:
        super().__init__(
            [sys.executable, str(ROOT / "bench" / script), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        self._arena = f"{arena}{self.pid}"

    def files(self) -> list[Path]:
        """What its arenas have in shared memory."""
        return list(SHM.glob(f"shmroute-*-{self._arena}-*"))

    def children(self) -> list[int]:
        """Process ids of what it started itself."""
        said = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(child) for child in said.split()]

    def end(self) -> None:
        """Leave nothing of it."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)  # its children end with it
            self.wait()
        if self.stdout is not None:
            self.stdout.close()
        for path in self.files():
            path.unlink()


class ShortRun(Bench):
    """One that runs to its end by itself, shortly, and writes a result file into ``folder``."""

    def __init__(self, folder: Path, script: str, arena: str, *arguments: str) -> None:
        self._said, self._result = folder / "said", folder / "result.json"
        more = (*arguments, "--quick", "--json", str(self._result))
        with self._said.open("w") as output:
            super().__init__(script, arena, *more, output=output)

    def is_done(self) -> bool:
        return self.poll() is not None

    @property
    def said(self) -> str:
        return self._said.read_text()

    def result(self) -> dict[str, Any]:
        """What it has written, when it ended well."""
        assert self.wait() == 0, self.said
        result: dict[str, Any] = json.loads(self._result.read_text())
        return result
