"""Fixtures of the store's tests: arenas, actors (real processes), and a clean /dev/shm."""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from actors import LAYOUT
from forked import ForkServer, Program, state_of

from shmroute import Arena, reaper, segments

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHM = Path(segments.SHM_DIR)
# In the name of every arena that this process makes, and of nobody else's: pytest may run in
# several processes side by side, and the number of one may begin with that of another.
RUN = f"t{os.getpid()}-"
SETTLE_SECONDS = 5.0


def of_this_run() -> set[str]:
    return {entry for entry in os.listdir(SHM) if RUN in entry}


def reap_this_run() -> None:
    for segment in list(segments.list_segments()):
        if RUN in segment.arena:
            reaper.reap_segment(segment, force=True)


@pytest.fixture(autouse=True)
def shm_as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test left, reaping its arenas by force leaves /dev/shm as the test found it."""
    before = of_this_run()
    yield
    request.node.funcargs.clear()  # views among them would keep their leases
    reap_this_run()
    until = time.monotonic() + SETTLE_SECONDS
    while of_this_run() - before and time.monotonic() < until:
        gc.collect()  # some views are in cycles, some in a killed process's child, which ends soon
        reap_this_run()
        time.sleep(0.01)
    left = of_this_run() - before
    for entry in left:
        (SHM / entry).unlink()
    assert not left


@pytest.fixture
def name() -> str:
    """An arena name of this test's own."""
    return f"{RUN}{secrets.token_hex(3)}"


@pytest.fixture
def files(name: str) -> Callable[[], list[Path]]:
    """The files of this test's arenas."""
    return lambda: sorted(SHM.glob(f"shmroute-*-{name}-*"))


@pytest.fixture
def make_arena(name: str) -> Iterator[Callable[..., Arena]]:
    """Make small arenas of the test's name in this process; closed after the test."""
    made: list[Arena] = []

    def make(routes: Any = LAYOUT, **options: Any) -> Arena:
        made.append(Arena.create(name, routes, **{"capacity": "2MiB", "slots": 16, **options}))
        return made[-1]

    yield make
    for arena in made:
        arena.close()


@pytest.fixture
def arena(make_arena: Callable[..., Arena]) -> Arena:
    return make_arena()


class Actor:
    """A process that runs a piece of Python beside the test."""

    def __init__(self, process: subprocess.Popen[bytes] | Program, errors: Path) -> None:
        self.process = process
        self._errors = errors
        self._killed = False
        self._heard = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, fact: Any = None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fact).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, timeout: float = 60.0) -> dict[str, Any]:
        """The next thing that the actor says."""
        assert self.process.stdout is not None
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self.process.stdout], [], [], timeout)
            piece = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            assert piece, f"the actor said nothing: {self.errors()}"
            self._heard += piece
        line, self._heard = self._heard.split(b"\n", 1)
        said: dict[str, Any] = json.loads(line)
        return said

    def last_said(self) -> dict[str, Any]:
        """The last whole thing that a killed actor said; empty when it said nothing."""
        assert self.process.stdout is not None
        *lines, _ = (self._heard + self.process.stdout.read()).split(b"\n")
        return json.loads(lines[-1]) if lines else {}

    def kill(self) -> None:
        self._killed = True
        self.process.kill()
        self.process.wait()

    def stopped(self) -> None:
        """Wait until it has come to where it stops itself, or was stopped."""
        until = time.monotonic() + 60
        while state_of(self.pid) != "T":
            assert time.monotonic() < until, f"the actor did not stop: {self.errors()}"
            time.sleep(1e-3)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        self.stopped()

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def wait(self) -> int:
        """Wait until it ends by itself; returns its exit status."""
        return self.process.wait(timeout=60)

    def errors(self) -> str:
        return self._errors.read_text()

    def end(self) -> None:
        """Let it end; what it wrote to its standard error is an error of the test."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.go_on()  # a stopped one cannot hear
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        finally:
            self._kill_session()
            self.process.wait()
            self.process.stdout.close()
        assert self._killed or not self.errors()

    def _kill_session(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it forked
        except ProcessLookupError:
            return


def interpreter(command: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process for an actor, as it is where it cannot be forked."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=dict(os.environ, PYTHONPATH=f"{ROOT}:{HERE}"),
        start_new_session=True,
    )


@pytest.fixture
def interrupted_start(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], contextlib.AbstractContextManager[list[threading.Thread]]]:
    """Within it the start of a thread raises, as a signal's handler may; gives those threads."""

    @contextlib.contextmanager
    def interrupted() -> Iterator[list[threading.Thread]]:
        threads: list[threading.Thread] = []

        def start(thread: threading.Thread) -> None:
            threads.append(thread)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(KeyboardInterrupt):
                yield threads

    return interrupted


@pytest.fixture(scope="session")
def actors_server() -> Iterator[ForkServer]:
    """Forks the actors, whose tests would take a minute more if each were a new interpreter."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def actor(name: str, tmp_path: Path, actors_server: ForkServer) -> Iterator[Callable[..., Actor]]:
    """Start an actor: ``actor(code, NAME=..., prefix=[...], python=...)``.

    The code runs after ``from actors import *``; keyword arguments are its globals.
    """
    started: list[Actor] = []

    def start(
        code: str, *, python: str = sys.executable, prefix: tuple[str, ...] = (), **facts: Any
    ) -> Actor:
        given = json.dumps({"NAME": name, **facts})
        text = "\n".join(
            (
                "import json, os, shmroute, signal, sys, time",
                "import numpy as np",
                "from actors import *",
                "from shmroute import *",
                f"globals().update(json.loads({given!r}))",
                textwrap.dedent(code),
            )
        )
        errors = tmp_path / f"errors-of-actor-{len(started)}"
        with errors.open("wb") as stderr:
            if prefix or python != sys.executable:
                process = interpreter([*prefix, python, "-W", "error", "-c", text], stderr)
            else:
                process = actors_server.run(text, stderr)
        started.append(Actor(process, errors))
        return started[-1]

    yield start
    failures = []
    for one in started:
        try:
            one.end()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failures.append(str(error))
    assert not failures


@pytest.fixture
def private_shm(actor: Callable[..., Actor]) -> Callable[..., Actor]:
    """Start an actor in a mount namespace of its own with a small /dev/shm."""

    def start(code: str, options: str = "size=8m", **facts: Any) -> Actor:
        mount = f'mount -t tmpfs -o {options} tmpfs {SHM} && exec "$@"'
        prefix = ("unshare", "-m", "sh", "-c", mount, "sh")
        allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False)
        if allowed.returncode:
            pytest.skip(f"no mount namespace here: {allowed.stderr.decode().strip()}")
        return actor(code, prefix=prefix, **facts)

    return start


WRITER = """
    arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16)
    sealed = [add(arena, f"rid-{index}") for index in range(3)]
    unsealed = arena.reserve("unsealed", tokens=20)
    text = lambda record: base64.b64encode(record.ticket).decode()
    import base64
    say(sealed=[text(record) for record in sealed], unsealed=text(unsealed),
        segment=arena.segment.data)
    hear()
"""


@pytest.fixture
def writer(actor: Callable[..., Actor]) -> Actor:
    """A writer process with three sealed records, ``rid-0`` to ``rid-2``, and one unsealed."""
    started = actor(WRITER)
    started.facts = started.hear()  # type: ignore[attr-defined]
    return started


READER = """
    held = []
    while True:
        source = hear()
        if source is None:
            held.clear()
            say(held=0)
            continue
        try:
            routes = ShmRouteReader(source, arena=NAME, timeout=1.0)
            held.append(routes)
            say(intact=is_intact(routes), error="")
        except ShmRouteError as error:
            say(intact=False, error=type(error).__name__)
"""


@pytest.fixture
def reader(actor: Callable[..., Actor]) -> Callable[..., Actor]:
    """Start a reader process: ``say(source)`` opens and keeps, ``say(None)`` lets go of all."""
    return lambda **options: actor(READER, **options)


@pytest.fixture
def text() -> Callable[[bytes], str]:
    """A ticket as it stands in a response."""
    return lambda ticket: base64.b64encode(ticket).decode()


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """Start a process of a role in 5 ms: ``fork_server.start("module.Class")``."""
    server = ForkServer()
    yield server
    server.close()
