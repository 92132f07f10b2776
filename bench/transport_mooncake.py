"""The way through Mooncake Store, which has servers of its own.

As its documentation has it for processes of one node: a client process of Mooncake's holds the
store, and producer and readers, "dummy clients", share registered memory with it. ``put_from`` has
that process copy the producer's memory into the store, ``get_buffer`` a record out of it into the
reader's.

Beside it, with the client's cache of hot objects, which readers map. An object goes there when it
has been asked for, behind the answer, and readers that all ask for a record once, at the same
moment, gain nothing by it. So the producer, too, asks for each record, once and first: its own
time doubles, and that of many readers halves. The documentation does not say to do so. A reader
that is killed keeps its block of the cache for ever; when the last is gone, all readers copy.

It needs libibverbs of the system, and it listens on every interface, so it runs only where this
process has a network of its own (`loopback`).

    python bench/transport_mooncake.py PROGRAM [ARGUMENT ...]

becomes a program of Mooncake's that ends with its parent.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from crash_processes import end_with
from route_chains import LAYERS, TOP_K, new_rid
from transport_ways import Array, Opener, Record, Way

HOST = "127.0.0.1"  # of a network that nobody else has
START_SECONDS, END_SECONDS = 30.0, 5.0
STORED_RECORDS = 4  # of the largest
SLACK_BYTES = 16 << 20
#: Mooncake's own, for a memcpy where both ends are in one process, and for silence.
ENVIRONMENT = {"MC_STORE_MEMCPY": "1", "MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "3"}

CACHED_RECORDS = 4

Locator: TypeAlias = tuple[str, int, str]  # key, bytes of the largest record, Mooncake's client


def why_not() -> str | None:
    """Why it cannot run here, besides the network; None if it can."""
    if importlib.util.find_spec("mooncake") is None:
        return "mooncake-transfer-engine-non-cuda is not installed"
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        return f"its library does not load ({error})"
    return None


def _cache(largest_bytes: int) -> dict[str, str]:
    """What has a client keep hot objects where readers map them, from the first time on."""
    return {
        "MC_STORE_LOCAL_HOT_CACHE_SIZE": str(CACHED_RECORDS * largest_bytes),
        "MC_STORE_LOCAL_HOT_BLOCK_SIZE": str(largest_bytes),
        "MC_STORE_LOCAL_HOT_CACHE_USE_SHM": "1",
        "MC_STORE_LOCAL_HOT_ADMISSION_THRESHOLD": "1",
    }


def _connect(largest_bytes: int, client: str) -> Any:
    os.environ.update(ENVIRONMENT)
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    pool = largest_bytes + SLACK_BYTES
    _check(store.setup_dummy(pool, pool, client), "setup_dummy")
    return store


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"Mooncake's {what} failed with code {code}")


class MooncakeWay(Way[Locator]):
    """``put_from`` memory that was registered once; a locator has the key."""

    name = "Mooncake Store"
    copied: ClassVar = {"into registered memory": 1, "into the store": 1}
    copied_each: ClassVar = {"into the reader's memory": 1}
    first_port: ClassVar = 50051
    cached: ClassVar = False

    def __init__(self, largest_bytes: int) -> None:
        self._largest = largest_bytes
        self._live: dict[str, int] = {}
        cache = _cache(largest_bytes) if self.cached else {}
        with ExitStack() as at_failure:
            servers = _Servers(largest_bytes, self.first_port, cache)
            self._servers = at_failure.enter_context(closing(servers))
            self._store = _connect(largest_bytes, servers.client)
            at_failure.pop_all()
        self._address = self._store.alloc_from_mem_pool(largest_bytes)
        _check(self._store.register_buffer(self._address, largest_bytes), "register_buffer")
        memory = (ctypes.c_ubyte * largest_bytes).from_address(self._address)
        self._memory = np.ctypeslib.as_array(memory)

    def publish(self, record: Record, readers: int) -> Sequence[Locator]:
        key, size = new_rid(), record.rows.nbytes
        np.copyto(self._memory[:size], record.rows.reshape(-1))
        _check(self._store.put_from(key, self._address, size), "put_from")
        if self.cached:
            self._store.get_buffer(key)
        self._live[key] = (3 if self.cached else 2 + readers) * size
        return [(key, self._largest, self._servers.client)] * readers

    def retire(self) -> None:
        while self._live:
            key, _ = self._live.popitem()
            _check(self._store.remove(key, True), "remove")

    def shared_bytes(self) -> int:
        """The record in the store, in its cache, and in the memory that producer and readers share
        with it.
        """
        return sum(self._live.values())

    def pids(self) -> list[int]:
        return self._servers.pids()

    def close(self) -> None:
        self.drain()
        self._store.close()
        self._servers.close()


class MooncakeCachedWay(MooncakeWay):
    """The same, and ``get_buffer`` once by the producer, so that readers find it in the cache."""

    name = "Mooncake Store, cached"
    copied: ClassVar = {
        **MooncakeWay.copied,
        "into the producer's memory": 1,
        "into the cache": 1,
    }
    copied_each: ClassVar = {}
    first_port = 50061
    cached = True


class _Servers:
    """Mooncake's master and its client, which holds the store, on three ports from the first on."""

    def __init__(self, largest_bytes: int, first_port: int, more: Mapping[str, str]) -> None:
        self._environment = {**os.environ, **ENVIRONMENT, **more}
        master_port, client_port, metrics_port = range(first_port, first_port + 3)
        self.client = f"{HOST}:{client_port}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="mooncake-")
        self._log = Path(self._folder.name, "log")
        try:
            self._start(
                master_port,
                "mooncake_master",
                f"--rpc_address={HOST}",
                f"--rpc_port={master_port}",
                f"--metrics_host={HOST}",
                f"--metrics_port={metrics_port}",
                "--enable_metric_reporting=false",
            )
            self._start(
                client_port,
                "mooncake_client",
                f"--host={HOST}",
                f"--port={client_port}",
                f"--master_server_address={HOST}:{master_port}",
                "--metadata_server=P2PHANDSHAKE",
                "--protocol=tcp",
                f"--global_segment_size={largest_bytes * STORED_RECORDS + SLACK_BYTES}",
                f"--local_buffer_size={largest_bytes + SLACK_BYTES}",
            )
        except BaseException:
            self.close()
            raise

    def _start(self, port: int, program: str, *arguments: str) -> None:
        """Start a program of the package's and wait until it listens."""
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        path = Path(spec.submodule_search_locations[0], program)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, str(path), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        self._processes.append(process)
        until = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > until:
                said = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{program} did not start: {said}")
            time.sleep(0.05)

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End both, and forget what they said."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()


def _listens(port: int) -> bool:
    """Whether somebody in this network listens on an address of IPv4."""
    lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    return any(
        fields[1].endswith(f":{port:04X}") and fields[3] == "0A"
        for fields in (line.split() for line in lines)
    )


class MooncakeOpener(Opener[Locator]):
    """``get_buffer``: a copy in memory that this process shares with Mooncake's client, or a
    block of its cache, which both have mapped.
    """

    def __init__(self) -> None:
        self._store: Any = None

    def open(self, locator: Locator) -> Array:
        key, largest_bytes, client = locator
        if self._store is None:
            self._store = _connect(largest_bytes, client)
        self._buffer = self._store.get_buffer(key)
        if self._buffer is None:
            raise KeyError(key)
        return np.frombuffer(self._buffer, np.uint8).reshape(-1, LAYERS, TOP_K)

    def drop(self) -> None:
        self._buffer = None


if __name__ == "__main__":
    end_with(os.getppid())
    os.execv(sys.argv[1], sys.argv[1:])
