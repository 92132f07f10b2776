"""A trainer's framework in a process of its own: its imports, patches and warnings stay there.

A test file has one such process, which runs the functions of a script beside it: ``ask("name",
fact=...)`` calls ``name(fact=...)`` there. What it asserts is an error of the test.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ANSWER, READY = "ANSWER ", "READY\n"
STARTS_WITHIN = 180.0  # imports of verl and Megatron, with other tests beside


class PeerProcess:
    """Runs ``script`` under ``python``."""

    def __init__(self, python: Path, script: str, errors: Path) -> None:
        paths = [ROOT, HERE]
        self._errors = errors
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [str(python), "-W", "ignore", str(HERE / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(os.environ, PYTHONPATH=":".join(map(str, paths)), RAY_DEDUP_LOGS="0"),
            )
        self._heard = b""
        self._is_done = False

    @property
    def said(self) -> str:
        return self._errors.read_text()[-3000:]

    def is_done(self) -> bool:
        """Whether it is ready to be asked, or has ended."""
        if not self._is_done and select.select([self._process.stdout], [], [], 0)[0]:
            self._is_done = self._hear() == b"" or READY.encode() in self._heard
        return self._is_done

    def ask(self, case: str, **facts: Any) -> Any:
        """Call a function there; what it returns, or an ``AssertionError`` with its traceback."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([case, facts]).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._next_answer()
        assert "error" not in answer, f"{case} in {self._process.args}\n{answer['error']}"
        return answer["value"]

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.kill()  # it has nothing to clean up, and taking all of verl down takes 3 s
        self._process.wait()
        self._process.stdout.close()

    def _next_answer(self) -> Any:
        while True:
            line = self._line()
            if line.startswith(ANSWER):
                return json.loads(line[len(ANSWER) :])

    def _hear(self) -> bytes:
        assert self._process.stdout is not None
        piece = os.read(self._process.stdout.fileno(), 1 << 16)
        self._heard += piece
        return piece

    def _line(self) -> str:
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._process.stdout], [], [], STARTS_WITHIN)
            assert ready, f"the process said nothing more: {self.said}"
            assert self._hear(), f"the process has ended: {self.said}"
        line, self._heard = self._heard.split(b"\n", 1)
        return line.decode()


def serve(cases: Mapping[str, Any]) -> None:
    """The other side: run what is asked for until the test ends."""
    print("\n" + READY, end="", flush=True)
    for line in sys.stdin:
        case, facts = json.loads(line)
        try:
            answer = {"value": cases[case](**facts)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print("\n" + ANSWER + json.dumps(answer), flush=True)
