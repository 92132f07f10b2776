"""The way through NIXL: a reader fetches a record out of the producer's registered memory.

NIXL moves bytes between two agents and keeps no records, so what a store does besides is left out
here: the producer keeps a registered buffer for each record that is in flight, and the locator
says where it is. One record at a time is in flight, so the buffer is the same every time, and may
still be in the cache, where the arena goes on to other memory. UCX has shared memory and
``process_vm_readv`` ("cma") only, so it listens on nothing.
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


class NixlOpener(Opener[Locator]):
    """READs into a registered buffer, which the next record gets again."""

    def __init__(self) -> None:
        self._agent = _agent(f"reader-{os.getpid()}")
        self._buffer: Registered | None = None
        self._metadata = b""
        self._producer = ""

    def open(self, locator: Locator) -> Array:
        metadata, address, size = locator
        if metadata != self._metadata:
            self._producer = self._agent.add_remote_agent(metadata)
            self._metadata = metadata
        buffer = self._of(size)
        self._fetch(buffer.address, address, size)
        return buffer.array[:size].reshape(-1, LAYERS, TOP_K)

    def _of(self, size: int) -> Registered:
        if self._buffer is None or len(self._buffer.array) < size:
            self.trim()
            self._buffer = Registered.take(self._agent, size)
        return self._buffer

    def _fetch(self, to: int, address: int, size: int) -> None:
        agent = self._agent
        here = agent.get_xfer_descs([(to, size, 0)], "DRAM")
        there = agent.get_xfer_descs([(address, size, 0)], "DRAM")
        transfer = agent.initialize_xfer("READ", here, there, self._producer)
        state = agent.transfer(transfer)
        until = time.monotonic() + SECONDS
        while state == "PROC" and time.monotonic() < until:
            state = agent.check_xfer_state(transfer)
        agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise RuntimeError(f"NIXL's READ ended as {state}")

    def trim(self) -> None:
        if self._buffer is not None:
            self._agent.deregister_memory(self._buffer.registration)
            self._buffer = None
