"""The way through NIXL: a reader fetches a record out of the producer's registered memory.

NIXL moves bytes between two agents and keeps no records, so what a store does besides is left out
here: the producer keeps a registered buffer for each record that is in flight, and the locator
says where it is. One record at a time is in flight, so the buffer is the same every time. UCX has
shared memory and ``process_vm_readv`` ("cma") only, so it listens on nothing.

A reader prepares the descriptor lists of both ends and the request once, and posts that again for
every record of the same size at the same place, as NIXL's documentation has it for transfers that
repeat.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from route_chains import LAYERS, TOP_K
from transport_ways import Array, Opener, Record, Way

ENVIRONMENT = {
    "UCX_TLS": "posix,sysv,cma,self",
    "UCX_LOG_LEVEL": "error",
    "NIXL_LOG_LEVEL": "ERROR",
}
SECONDS = 60.0

Locator: TypeAlias = tuple[bytes, int, int]  # the producer's metadata, address, bytes


def _agent(name: str) -> Any:
    os.environ.update(ENVIRONMENT)
    from nixl_cu12 import nixl_agent, nixl_agent_config

    # No thread of its own, which would spin: all transfers are the reader's.
    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=[]))
    # Shared memory does not tell of a dead peer, which NIXL asks for unless told.
    agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
    return agent


@dataclass(slots=True)
class Registered:
    """Memory that an agent knows."""

    array: Array
    registration: Any

    @classmethod
    def take(cls, agent: Any, size: int) -> Registered:
        array = np.empty(size, np.uint8)
        place = [(array.ctypes.data, size, 0, "")]
        return cls(array, agent.register_memory(place, "DRAM", backends=["UCX"]))

    @property
    def address(self) -> int:
        return self.array.ctypes.data


class NixlWay(Way[Locator]):
    """Copies a record into a registered buffer; readers fetch it themselves."""

    name = "NIXL"
    copied: ClassVar = {"into a registered buffer": 1}
    copied_each: ClassVar = {"into the reader's buffer": 1}

    def __init__(self, largest_bytes: int) -> None:
        self._largest = largest_bytes
        self._agent = _agent(f"producer-{os.getpid()}")
        self._metadata = b""
        self._free: list[Registered] = []
        self._live: list[Registered] = []

    def publish(self, record: Record, readers: int) -> Sequence[Locator]:
        buffer = self._buffer()
        size = record.rows.nbytes
        np.copyto(buffer.array[:size], record.rows.reshape(-1))
        return [(self._metadata, buffer.address, size)] * readers

    def _buffer(self) -> Registered:
        if not self._free:
            self._free.append(Registered.take(self._agent, self._largest))
            self._metadata = bytes(self._agent.get_agent_metadata())
        self._live.append(self._free.pop())
        return self._live[-1]

    def retire(self) -> None:
        self._free += self._live
        self._live.clear()

    def drain(self) -> None:
        self.retire()
        while self._free:
            self._agent.deregister_memory(self._free.pop().registration)

    def shared_bytes(self) -> int:
        return 0


@dataclass(slots=True)
class Prepared:
    """A request to READ, and the descriptor lists that it is made of."""

    agent: Any
    lists: tuple[Any, Any]
    request: Any

    @classmethod
    def make(cls, agent: Any, to: int, producer: str, address: int, size: int) -> Prepared:
        here = agent.prep_xfer_dlist("NIXL_INIT_AGENT", [(to, size, 0)], "DRAM")
        there = agent.prep_xfer_dlist(producer, [(address, size, 0)], "DRAM")
        request = agent.make_prepped_xfer("READ", here, [0], there, [0])
        return cls(agent, (here, there), request)

    def fetch(self) -> None:
        state = self.agent.transfer(self.request)
        until = time.monotonic() + SECONDS
        while state == "PROC" and time.monotonic() < until:
            state = self.agent.check_xfer_state(self.request)
        if state != "DONE":
            raise RuntimeError(f"NIXL's READ ended as {state}")

    def release(self) -> None:
        self.agent.release_xfer_handle(self.request)
        for each in self.lists:
            self.agent.release_dlist_handle(each)


class NixlOpener(Opener[Locator]):
    """READs into a registered buffer, which the next record gets again."""

    def __init__(self) -> None:
        self._agent = _agent(f"reader-{os.getpid()}")
        self._buffer: Registered | None = None
        self._metadata = b""
        self._producer = ""
        self._locator: Locator | None = None  # what ``_prepared`` is for
        self._prepared: Prepared | None = None

    def open(self, locator: Locator) -> Array:
        size = locator[2]
        if self._prepared is None or self._locator != locator:
            self._prepare(locator)
        assert self._prepared is not None
        assert self._buffer is not None
        self._prepared.fetch()
        return self._buffer.array[:size].reshape(-1, LAYERS, TOP_K)

    def _prepare(self, locator: Locator) -> None:
        self._forget()
        metadata, address, size = locator
        if metadata != self._metadata:
            self._producer = self._agent.add_remote_agent(metadata)
            self._metadata = metadata
        buffer = self._of(size)
        self._prepared = Prepared.make(self._agent, buffer.address, self._producer, address, size)
        self._locator = locator

    def _of(self, size: int) -> Registered:
        if self._buffer is None or len(self._buffer.array) < size:
            self.trim()
            self._buffer = Registered.take(self._agent, size)
        return self._buffer

    def _forget(self) -> None:
        if self._prepared is not None:
            self._prepared.release()
            self._prepared = None

    def trim(self) -> None:
        self._forget()
        if self._buffer is not None:
            self._agent.deregister_memory(self._buffer.registration)
            self._buffer = None
