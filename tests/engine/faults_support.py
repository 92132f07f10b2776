"""Engines with faults in them, and engines started in other ways than from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_process import EngineStartError, ServerProcess, shared_memory_files

HERE = Path(__file__).parent
# Several engines and this process share few cores: their thread pools must not fight.
CALM = {"OMP_NUM_THREADS": "1"}


class FaultPlugin:
    """``fault_plugin`` as a distribution that an engine finds before any other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "faults"
        self.folder.mkdir()
        information = folder / "path" / "fault_plugin-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: fault-plugin\nVersion: 1.0\n"
        )
        (information / "entry_points.txt").write_text(
            "[sglang.srt.plugins]\nfault_plugin = fault_plugin:register\n"
        )
        self._path = os.pathsep.join([str(information.parent), str(HERE)])

    def env(self, *faults: str, **variables: str) -> dict[str, str]:
        """Environment of an engine with these faults."""
        return {
            **CALM,
            "PYTHONPATH": self._path,
            "FAULTS": ",".join(faults),
            "FAULT_FOLDER": str(self.folder),
            **variables,
        }

    def turn_on(self, name: str, **content: Any) -> None:
        unfinished = self.folder / (name + ".tmp")
        unfinished.write_text(json.dumps(content))
        unfinished.rename(self.folder / name)

    def turn_off(self, name: str) -> None:
        (self.folder / name).unlink()


class SmallShmServer(ServerProcess):
    """A server in a mount namespace whose /dev/shm holds 64 MiB."""

    def command(self) -> list[str]:
        mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mount, "sh", *super().command()]


class TrainerServer(ServerProcess):
    """A server that a trainer starts: in a child process, from Python, with no flag of ours.

    ``SHMROUTE_*`` variables ask for the arena.
    """

    def command(self) -> list[str]:
        _, _, _, *args = super().command()
        return [sys.executable, str(HERE / "trainer_start.py"), *args]


class OfflineEngine(ServerProcess):
    """``sglang_bridge.Engine`` in a process of its own, asked line by line."""

    def __init__(self, model: Path, arguments: Mapping[str, Any], **options: Any) -> None:
        super().__init__(model, **options)
        self._arguments = {"model_path": str(model), **arguments}

    def command(self) -> list[str]:
        return [sys.executable, str(HERE / "offline_engine.py"), json.dumps(self._arguments)]

    def start(self) -> None:
        assert self._log_path is not None
        self._before = set(shared_memory_files().values())
        with self._log_path.open("wb") as log:
            self._child = subprocess.Popen(
                self.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.env, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        try:
            assert self._answer() == "started"
        except BaseException:
            self.stop()
            raise

    def ask(self, **question: Any) -> Any:
        """One question, one answer."""
        assert self._child is not None
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(question).encode() + b"\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._child is not None
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(b"ANSWER "):  # SGLang prints, too
                self.observe()
                return json.loads(line[len(b"ANSWER ") :])
        raise EngineStartError(f"the engine ended ({self._child.wait()}):\n{self.log[-4000:]}")

    def stop(self, keep_log: bool = False) -> None:
        super().stop(keep_log)
        assert self._child is not None
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()
