"""Processes that a test can afford by the thousand: forked, in 5 ms, and killed at will.

An interpreter with numpy takes 0.4 s to start. So one process imports everything, holds nothing,
and forks: it is sent a role (``module.Class``) and one end of a socket pair, and answers with the
child's pid. Test and child exchange JSON lines over the pair: the name of a method of the role and
its arguments, then what it returned. A child ends with the test's end of the pair.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_SECONDS = 60.0


# -- the test's side ---------------------------------------------------------------------------


def in_child(work: Callable[[], object], seconds: int = 10) -> int:
    """Exit status of a forked child that runs ``work``; -SIGALRM when it hung."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class ForkServer:
    """The process that forks the others."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # A process with threads, as OpenBLAS makes them, must not fork.
                env=dict(
                    os.environ, PYTHONPATH=f"{HERE.parents[1]}:{HERE}", OPENBLAS_NUM_THREADS="1"
                ),
            )

    def start(self, role: str) -> Process:
        """A new process of this role."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._socket, [role.encode()], [theirs.fileno()])
        return Process(self, int(self._socket.recv(64)), ours)

    def wait(self, pid: int) -> int:
        """Exit status of a child when it has ended, negative for a signal.

        The kernel has dropped all its locks by then, which the end of its socket does not say.
        """
        self._socket.send(str(pid).encode())
        return int(self._socket.recv(64))

    def close(self) -> None:
        self._socket.close()
        assert self._process.wait(_SECONDS) == 0


class Process:
    """A forked process: what it is told, it does, and says what came of it."""

    def __init__(self, server: ForkServer, pid: int, line: socket.socket) -> None:
        self.pid = pid
        self.status: int | None = None
        self._server = server
        self._line = line
        self._talk = line.makefile("rw", encoding="utf-8")
        line.settimeout(_SECONDS)

    def do(self, command: str, **facts: Any) -> Any:
        """Have a command run; its result."""
        self.begin(command, **facts)
        return self.finish()

    def begin(self, command: str, **facts: Any) -> None:
        """Have a command run, beside what the test does meanwhile."""
        self._asked = f"{command}({facts})"
        self._talk.write(json.dumps([command, facts]) + "\n")
        self._talk.flush()

    def finish(self) -> Any:
        """The result of what was begun."""
        said = self._talk.readline()
        if not said:
            raise AssertionError(f"{self._asked} ended the process: status {self.end()}")
        answer = json.loads(said)
        assert "crash" not in answer, f"{self._asked}:\n{answer['crash']}"
        return answer["result"]

    def kill(self) -> None:
        """SIGKILL."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)  # nobody has waited for it: the pid is its own
            self.end()

    def end(self) -> int:
        """Let it end, if it has not; its exit status."""
        if self.status is None:
            self._talk.close()
            self._line.close()
            self.status = self._server.wait(self.pid)
        return self.status


# -- the forked side ---------------------------------------------------------------------------


def _serve(role: type, line: socket.socket) -> None:
    actor = role()
    with line.makefile("rw", encoding="utf-8") as talk:
        for asked in talk:
            command, facts = json.loads(asked)
            try:
                answer = {"result": getattr(actor, command)(**facts)}
            except Exception:
                answer = {"crash": traceback.format_exc()}
            talk.write(json.dumps(answer) + "\n")
            talk.flush()


def _fork_for(server: socket.socket) -> None:
    while True:
        asked, fds, _flags, _address = socket.recv_fds(server, 256, 1)
        if not asked:
            return
        if not fds:
            _pid, status = os.waitpid(int(asked), 0)
            server.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        module, _, name = asked.decode().rpartition(".")
        role = getattr(importlib.import_module(module), name)
        with socket.socket(fileno=fds[0]) as line:
            pid = os.fork()
            if pid == 0:
                server.close()
                _serve(role, line)
                os._exit(0)
        server.send(str(pid).encode())


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as asking:
        _fork_for(asking)
