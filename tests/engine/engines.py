"""Starts and ends of real engines, and what each end left in ``/dev/shm``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine_process import SHARED_MEMORY, ServerProcess
from small_models import shape_of
from traffic import Traffic

#: How an engine ends. ``kill``: SIGKILL of every process of it, as ``Engine.shutdown`` does;
#: ``terminate``: SIGTERM to its launcher, which lets requests finish first.
Ending = Literal["kill", "terminate"]

CAPACITY, SLOTS = "64MiB", 1024


@dataclass(frozen=True, slots=True)
class Ended:
    """An engine that has ended: ``files`` of the arena name, and their memory, afterwards."""

    name: str
    ending: Ending
    with_arena: bool
    files: int
    taken_bytes: int


class Engines:
    """Starts engines whose arenas all have the name ``arena``; ``ended`` lists them.

    Parameters
    ----------
    logs
        Folder for each engine's output.
    """

    def __init__(self, arena: str, logs: Path) -> None:
        self.arena = arena
        self.ended: list[Ended] = []
        self._logs = logs

    @contextmanager
    def serve(
        self,
        name: str,
        model: Path,
        *args: str,
        ending: Ending,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[Traffic]:
        """Serve ``model`` over HTTP with an arena, in shadow mode.

        At the end every record that a response spoke of is released. The traffic may be
        asked for its counters and its log afterwards.
        """
        shadowed = (
            f"--shmroute-arena={self.arena}",
            f"--shmroute-capacity={CAPACITY}",
            f"--shmroute-slots={SLOTS}",
            "--shmroute-shadow",
        )
        server = ServerProcess(model, *shadowed, *args, env=env, log=self._logs / f"{name}.log")
        with self.ends(name, ending), server:
            with self._traffic(server, self.arena) as traffic:
                yield traffic
            if ending == "terminate":
                server.terminate()

    @contextmanager
    def serve_without_arena(
        self, name: str, model: Path, *args: str, env: Mapping[str, str] | None = None
    ) -> Iterator[Traffic]:
        """Serve ``model`` as SGLang does alone."""
        server = ServerProcess(model, *args, env=env, log=self._logs / f"{name}.log")
        with (
            self.ends(name, "kill", with_arena=False),
            server,
            self._traffic(server, "") as traffic,
        ):
            yield traffic

    @contextmanager
    def _traffic(self, server: ServerProcess, arena: str) -> Iterator[Traffic]:
        with Traffic(server.url, arena, shape_of(server.model), lambda: server.log) as traffic:
            yield traffic
            traffic.finish()

    @contextmanager
    def ends(self, name: str, ending: Ending, *, with_arena: bool = True) -> Iterator[None]:
        """Note what is there once the engine within has ended."""
        yield
        files = self.files()
        taken = sum((SHARED_MEMORY / file).stat().st_blocks * 512 for file in files)
        self.ended.append(Ended(name, ending, with_arena, len(files), taken))

    def files(self) -> list[str]:
        """Files of this arena name in ``/dev/shm``, whatever engine made them."""
        prefix = f"shmroute-{os.geteuid()}-{self.arena}-"
        return [name for name in os.listdir(SHARED_MEMORY) if name.startswith(prefix)]
