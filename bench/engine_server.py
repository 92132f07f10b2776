"""The servers that ``engine.py`` measures: SGLang's own, or the same with a trace.

    python bench/engine_server.py FLAG...        (those of sglang.launch_server)

Run as a script this is ``sglang.launch_server`` whose scheduler process writes what it spends
into the file that ``SHMROUTE_BENCH_TRACE`` names (`engine_trace`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import engine_trace
from engine_process import ServerProcess

START_SECONDS = 400.0


class EngineServer(ServerProcess):
    """A server whose arena and trace are what is said here, whatever the caller's settings.

    Parameters
    ----------
    trace
        File that its scheduler writes into (`engine_trace.create`); None: SGLang's own server.
    """

    def __init__(
        self, model: Path, flags: list[str], *, gpu: bool, trace: Path | None, log: Path
    ) -> None:
        self.trace = trace
        env = {name: "" for name in os.environ if name.startswith("SHMROUTE_")}
        if trace:
            env[engine_trace.FILE_VARIABLE] = str(trace)
            self.program = (__file__,)
        super().__init__(model, *flags, env=env, log=log, timeout=START_SECONDS, cpu=not gpu)


def main() -> None:
    """What ``sglang.launch_server`` does for a server of HTTP, with another scheduler process."""
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    arguments = prepare_server_args(sys.argv[1:])
    try:
        launch_server(arguments, run_scheduler_process_func=engine_trace.run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
