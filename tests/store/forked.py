"""Processes that a test can afford by the thousand: forked, in 5 ms, and killed at will.

An interpreter with numpy takes 0.4 s to start. So one process imports everything, holds nothing,
and forks: it is sent a role (``module.Class``) and one end of a socket pair, and answers with the
child's pid. Test and child exchange JSON lines over the pair: the name of a method of the role and
its arguments, then what it returned. A child ends with the test's end of the pair.

Or it is sent the text of a program and its three standard streams. The child runs it as Python
runs what follows ``-c``, from importing it as ``__main__`` to the interpreter's end.
"""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

HERE = Path(__file__).parent
_SECONDS = 60.0
_PAUSE = 1e-3
_MOST_BYTES = 1 << 16  # of a role's name or a program's text


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

    def run(self, text: str, errors: IO[bytes]) -> Program:
        """A new process that runs this text."""
        assert len(text.encode()) < _MOST_BYTES, "the rest of it would be cut off"
        stdin, stdout = os.pipe(), os.pipe()
        theirs = [stdin[0], stdout[1]]
        socket.send_fds(self._socket, [text.encode()], [*theirs, errors.fileno()])
        for fd in theirs:
            os.close(fd)
        return Program(self, int(self._socket.recv(64)), stdin[1], stdout[0])

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


class Program:
    """A forked process that runs a text: as much of a ``Popen`` as an actor needs."""

    def __init__(self, server: ForkServer, pid: int, stdin: int, stdout: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin = os.fdopen(stdin, "wb", buffering=0)
        self.stdout = os.fdopen(stdout, "rb")
        self._server = server

    def wait(self, timeout: float = _SECONDS) -> int:
        until = time.monotonic() + timeout
        while self.returncode is None:
            if state_of(self.pid) == "Z":
                self.returncode = self._server.wait(self.pid)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            else:
                time.sleep(_PAUSE)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # nobody has waited for it: the pid is its own
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def state_of(pid: int) -> str:
    """One letter, as ``ps`` has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


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


def _fork_for(server: socket.socket) -> str:
    """Until nobody asks any more; in a child that is to run a program, its text."""
    while True:
        asked, fds, _flags, _address = socket.recv_fds(server, _MOST_BYTES, 3)
        if not asked:
            return ""
        if not fds:
            _pid, status = os.waitpid(int(asked), 0)
            server.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        text = asked.decode()
        role = None if len(fds) > 1 else pkgutil.resolve_name(text)
        pid = os.fork()
        if pid == 0:
            server.close()
            if role is None:
                _take_streams(fds)
                return text
            with socket.socket(fileno=fds[0]) as line:
                _serve(role, line)
            os._exit(0)
        for fd in fds:
            os.close(fd)
        server.send(str(pid).encode())


def _take_streams(fds: Sequence[int]) -> None:
    os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)


if __name__ == "__main__":
    import actors  # noqa: F401 (what a program begins with)

    with socket.socket(fileno=int(sys.argv[1])) as asking:
        program = _fork_for(asking)
    if program:
        sys.argv = ["-c"]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
