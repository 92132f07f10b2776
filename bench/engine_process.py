"""The real SGLang HTTP server as a child process that leaves nothing behind.

Problem: SGLang is a tree of processes whose normal end is SIGKILL, so its
children may outlive a crashed parent and its shared-memory files stay in
``/dev/shm``. On a shared machine neither may be cleared by name: another
engine's processes and files look the same.

Approach: the server gets a session of its own, by which its processes are found
even after their parent died, and each is killed by its id. A file counts as
this server's if it was not there before the start and one of its processes was
seen with it mapped or open; of these only SGLang's own kinds are removed, never
an arena, whose records must survive their engine.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

SHARED_MEMORY = Path("/dev/shm")
SGLANG_FILES = re.compile(r"sglang_loads_|sem\.(?:mp|loky)-|sgl_shm_|psm_")
SETTLE_SECONDS = 5.0
MAPPED_INODE = re.compile(r" (\d+) +/dev/shm/")

#: What SGLang needs in order to run on a plain CPU, for every configuration.
CPU_ENV: Mapping[str, str] = {
    "SGLANG_PLATFORM": "shmroute_cpu",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # For models this small a second thread only waits: 10 times faster where cores are shared.
    "OMP_NUM_THREADS": "1",
}
CPU_ARGS: tuple[str, ...] = (
    "--device=cpu",
    "--attention-backend=torch_native",
    "--cuda-graph-backend-decode=disabled",
    "--cuda-graph-backend-prefill=disabled",
    "--mem-fraction-static=0.2",
    "--max-total-tokens=16384",
    "--max-running-requests=64",
)


class EngineStartError(RuntimeError):
    """The server ended or stayed unready; the message ends with its log."""


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections.

    One of those can be taken by any connection between this look and the server's start.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def shared_memory_files() -> dict[str, int]:
    """Inode of every file in /dev/shm, by name."""
    return {entry.name: entry.inode() for entry in os.scandir(SHARED_MEMORY)}


def inodes_in_use(pid: int) -> set[int]:
    """Inodes in /dev/shm that process ``pid`` has mapped or open.

    Not names: a POSIX semaphore is created under another name than it is given.
    """
    inodes: set[int] = set()
    # The process may end, or be another user's, between any two reads.
    with contextlib.suppress(OSError):
        inodes.update(map(int, MAPPED_INODE.findall(Path(f"/proc/{pid}/maps").read_text())))
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if link.readlink().parent == SHARED_MEMORY:
                    inodes.add(link.stat().st_ino)
    return inodes


def processes_of(session: int) -> Iterator[psutil.Process]:
    """Live processes of a session, whatever became of their parents."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == session:
                yield process


def left_behind(names: re.Pattern[str], before: Collection[int]) -> list[str]:
    """Files in /dev/shm, but for these inodes, whose names match and that no other living process
    uses. Those of an engine that just ends go in a moment, and are waited for.
    """
    until = time.monotonic() + SETTLE_SECONDS
    while (left := _unused(names, before)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def _unused(names: re.Pattern[str], before: Collection[int]) -> list[str]:
    others = (process.pid for process in psutil.process_iter() if process.pid != os.getpid())
    in_use = set().union(*map(inodes_in_use, others))
    return [
        name
        for name, inode in shared_memory_files().items()
        if names.match(name) and inode not in before and inode not in in_use
    ]


def remove_sglang_files(inodes: Collection[int]) -> None:
    """Remove files of SGLang's own kinds in /dev/shm among those with these inodes."""
    for name, inode in shared_memory_files().items():
        if inode in inodes and SGLANG_FILES.match(name):
            (SHARED_MEMORY / name).unlink(missing_ok=True)


class ServerProcess:
    """One SGLang server on loopback, from start to the last file it left.

    Parameters
    ----------
    model
        Checkpoint folder.
    args
        Arguments for ``sglang.launch_server``, after `CPU_ARGS` (the later wins).
    env
        Variables to add to this process's environment, after `CPU_ENV`.
    log
        File for the server's output; a temporary one by default.
    timeout
        Seconds that the start may take.
    cpu
        False leaves `CPU_ARGS` and `CPU_ENV` out: a server on the GPU.
    """

    #: What Python runs, before its arguments.
    program: tuple[str, ...] = ("-m", "sglang.launch_server")

    def __init__(
        self,
        model: Path | str,
        *args: str,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        timeout: float = 240.0,
        cpu: bool = True,
    ) -> None:
        self.model = model
        self.args = (*(CPU_ARGS if cpu else ()), *args)
        self.env = {**(CPU_ENV if cpu else {}), **(env or {})}
        self.timeout = timeout
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start_seconds = 0.0
        self._began = 0.0
        self._log_path = log
        self._own_log = log is None
        self._child: subprocess.Popen[bytes] | None = None
        self._before: set[int] = set()
        self._inodes: set[int] = set()
        self._processes: set[psutil.Process] = set()

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        if self._child is None:
            raise EngineStartError("the server was not started")
        return self._child.pid

    @property
    def log(self) -> str:
        """All output of the server up to now."""
        if self._log_path is None or not self._log_path.exists():
            return ""
        return self._log_path.read_text(errors="replace")

    def command(self) -> list[str]:
        where = ["--model-path", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        return [sys.executable, *self.program, *where, *self.args]

    def start(self) -> None:
        """Start the server and wait until it has generated a token."""
        self.launch()
        self.finish_start()

    def launch(self) -> None:
        """Start the server's processes; `finish_start` waits for them."""
        self._before = set(shared_memory_files().values())
        if self._log_path is None:
            handle, name = tempfile.mkstemp(prefix="sglang-", suffix=".log")
            os.close(handle)
            self._log_path = Path(name)
        self._began = time.monotonic()
        with self._log_path.open("wb") as output:
            self._child = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def finish_start(self) -> None:
        """Wait until a server that was launched has generated a token."""
        try:
            self.wait_ready(self._began + self.timeout)
        except BaseException:
            self.stop(keep_log=True)
            raise
        self.start_seconds = time.monotonic() - self._began

    def wait_ready(self, deadline: float) -> None:
        """Return once it serves; raises EngineStartError when it ends or ``deadline`` passes."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=25.0) as client:
            while not self._answers(client):
                self.check_starting(deadline)
        self.observe()

    def check_starting(self, deadline: float) -> None:
        """One look at a server that is not ready yet, and a short sleep."""
        assert self._child is not None
        self.observe()
        if self._child.poll() is not None:
            raise self._failure(f"ended with exit code {self._child.returncode}")
        if time.monotonic() > deadline:
            raise self._failure(f"was not ready after {self.timeout:.0f} s")
        time.sleep(0.2)

    def _answers(self, client: httpx.Client) -> bool:
        try:
            return client.get("/health_generate").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _failure(self, what: str) -> EngineStartError:
        tail = "\n".join(self.log.splitlines()[-60:])
        return EngineStartError(
            f"the SGLang server {what}; command: {' '.join(self.command())}\n"
            f"end of its log ({self._log_path}):\n{tail}"
        )

    def observe(self) -> set[int]:
        """Note the server's live processes and the shared-memory files they use."""
        for process in processes_of(self.pid):
            self._processes.add(process)
            self._inodes |= inodes_in_use(process.pid) - self._before
        return {process.pid for process in self._processes if process.is_running()}

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 300.0) -> Any:
        """POST ``body`` as JSON and return the decoded answer; an HTTP error raises."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=timeout) as client:
            return client.post(path, json=body).raise_for_status().json()

    def kill9_tree(self) -> None:
        """SIGKILL every process of the server, as SGLang's own shutdown does."""
        # A process forked while the others were being killed shows up in the next round.
        while self.observe():
            for process in self._processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if self._child is not None:
                self._child.wait()
            psutil.wait_procs(list(self._processes), timeout=10)
            self._processes = {p for p in self._processes if self._alive(p)}

    def wait(self, timeout: float) -> int | None:
        """Wait for its end; the exit code, or None when it still runs after ``timeout`` seconds."""
        assert self._child is not None, "the server was not started"
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def terminate(self, timeout: float = 90.0) -> None:
        """End the server in good order: SIGTERM, and wait until it has gone.

        Raises
        ------
        TimeoutError
            It is still there after ``timeout`` seconds.
        """
        self.observe()
        assert self._child is not None, "the server was not started"
        self._child.terminate()
        if self.wait(timeout) is None:
            raise TimeoutError(f"the server outlived its SIGTERM by {timeout:.0f} s")

    def _alive(self, process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def stop(self, keep_log: bool = False) -> None:
        """Kill the server and remove what SGLang left; calling it twice is harmless."""
        if self._child is None:
            return
        self.kill9_tree()
        remove_sglang_files(self._inodes)
        if self._own_log and not keep_log and self._log_path is not None:
            self._log_path.unlink(missing_ok=True)
