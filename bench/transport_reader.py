"""A reader: makes an ndarray of each locator it is given, reads all of it, and holds it.

    python bench/transport_reader.py ADDRESS

It connects to ADDRESS, a socket file of `transport_readers.Readers`; the key comes on stdin.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Client
from typing import Any

from crash_processes import end_with
from memory_watch import trim
from transport_readers import Reading, read_through

OPENERS = {
    "arena": "transport_ways.ArenaOpener",
    "multiprocessing.shared_memory": "transport_ways.SharedMemoryOpener",
    "torch.multiprocessing": "transport_ways.TorchOpener",
    "safetensors": "transport_files.SafetensorsOpener",
    "pyarrow IPC file": "transport_files.ArrowOpener",
    "LMDB": "transport_files.LmdbOpener",
    "Mooncake Store": "transport_mooncake.MooncakeOpener",
    "Mooncake Store, cached": "transport_mooncake.MooncakeOpener",
    "NIXL": "transport_nixl.NixlOpener",
    "SGLang native": "transport_responses.SGLangOpener",
    "vLLM native": "transport_responses.VllmOpener",
}


class Held:
    """The openers of one reader process, and what it holds through one of them."""

    def __init__(self) -> None:
        self._openers: dict[str, Any] = {}
        self._rows: Any = None
        self._opener: Any = None

    def answer(self, what: str, way: str, locator: Any) -> Reading | None:
        """Carry out one message of `Readers`."""
        if what == "read":
            return self._read(way, locator)
        if what == "drop":
            self._drop()
        else:
            self._trim()
        return None

    def _read(self, way: str, locator: Any) -> Reading:
        opener = self._openers.get(way)
        if opener is None:
            module, _, name = OPENERS[way].partition(".")
            opener = self._openers[way] = getattr(importlib.import_module(module), name)()
        rows = opener.open(locator)
        at = time.perf_counter()
        self._rows, self._opener = rows, opener
        return read_through(rows, at)

    def _drop(self) -> None:
        self._rows = None
        if self._opener is not None:
            self._opener.drop()
            self._opener = None

    def _trim(self) -> None:
        for opener in self._openers.values():
            opener.trim()
        trim()


def main() -> None:
    end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    key = sys.stdin.buffer.read()
    multiprocessing.current_process().authkey = key
    held = Held()
    with Client(sys.argv[1], "AF_UNIX", authkey=key) as parent, contextlib.suppress(EOFError):
        while True:
            what, way, locator = parent.recv()
            try:
                parent.send(held.answer(what, way, locator))
            except Exception as error:  # the producer raises it
                parent.send(error)


if __name__ == "__main__":
    main()
