"""Start SGLang's HTTP server as trainers do: from Python, in a spawned child process.

Nothing here names shmroute: the flags are SGLang's, the arena comes from the environment.
"""

from __future__ import annotations

import multiprocessing
import sys


def serve(argv: list[str]) -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    launch_server(prepare_server_args(argv))


if __name__ == "__main__":
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sys.argv[1:],))
    server.start()
    server.join()
    sys.exit(server.exitcode)
