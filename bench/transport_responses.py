"""Ways of rows inside an engine's response: SGLang's and vLLM's, through their own processes.

SGLang 0.5.23, as its code has it: the scheduler gathers int32 rows out of its host table and sends
them with the batch's output, pickled, over a zmq ``ipc://`` socket to the detokenizer process
(``sock_send`` with ``SGLANG_USE_PICKLE_IPC``, its default); that encodes them in base64 (pybase64)
and sends the text, pickled, to the HTTP process; the response is JSON (orjson) by uvicorn; the
client decodes base64. vLLM: the rows, uint8, leave the engine core as an array beside a msgpack
message, which zmq sends without a copy; the HTTP process makes base64 of what ``numpy.save`` gives.

Both end with one response to one client, which then has to serve every trainer rank. Here every
reader gets the response itself, JSON being made once: less than any framework does.

`transport_relays` runs the processes that come after the scheduler.
"""

from __future__ import annotations

import http.client
import io
import signal
import subprocess
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import orjson
import pybase64
import zmq
from route_chains import LAYERS, TOP_K, as_tensor, new_rid, response_with
from transport_ways import Array, Opener, Record, Way

RELAYS = Path(__file__).with_name("transport_relays.py")
BASE64 = 4 / 3
LINGER_MS = 0
TRIM = signal.SIGUSR1


class ResponseWay(Way[tuple[int, str]]):
    """A socket to the next process, and those processes; a locator is the HTTP port and a path."""

    gone_when_read = True

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-transports-")
        self._children: list[subprocess.Popen[bytes]] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        # As SGLang and vLLM have it: no limit, buffers of the kernel's choice.
        self._socket.set_hwm(0)
        first, self._port = self.start_relays()
        self._socket.connect(first)

    @abstractmethod
    def start_relays(self) -> tuple[str, int]:
        """Start the processes; the address of the first and the HTTP port."""

    @abstractmethod
    def send(self, rid: str, record: Record) -> None:
        """What the scheduler does for a finished request."""

    def address(self, name: str) -> str:
        return f"ipc://{self._folder.name}/{name}"

    def relay(self, *words: str) -> str:
        """Start one process and return what it says when it is ready."""
        child = subprocess.Popen(
            [sys.executable, str(RELAYS), *words], stdout=subprocess.PIPE, start_new_session=True
        )
        self._children.append(child)
        assert child.stdout is not None
        said = child.stdout.readline().decode()
        if not said:
            raise RuntimeError(f"{words[0]} ended with exit code {child.wait()}")
        return said

    def publish(self, record: Record, readers: int) -> Sequence[tuple[int, str]]:
        rid = new_rid()
        self.send(rid, record)
        return [(self._port, f"/{rid}/{readers}")] * readers

    def retire(self) -> None:
        """A response is gone when it has been sent."""

    def shared_bytes(self) -> int:
        return 0

    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def trim(self) -> None:
        for child in self._children:
            child.send_signal(TRIM)

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
        self._socket.close(LINGER_MS)
        self._context.term()
        self._folder.cleanup()


class SGLangWay(ResponseWay):
    """SGLang's own path."""

    name = "SGLang native"
    native = True
    copied: ClassVar = {
        "gather": 4,
        "pickle: a tensor's bytes, the message": 8,
        "socket: into zmq, into the kernel, out of it": 12,
        "unpickle": 4,
        "tobytes": 4,
        "base64, decode to str": 2 * 4 * BASE64,
        "pickle of the text": 4 * BASE64,
        "socket of the text": 3 * 4 * BASE64,
        "unpickle of the text": 4 * BASE64,
        "JSON": 4 * BASE64,
    }
    copied_each: ClassVar = {
        "HTTP: into the kernel, out of it": 2 * 4 * BASE64,
        "JSON": 4 * BASE64,
        "str to bytes": 4 * BASE64,
        "base64 decoded": 4,
    }

    def start_relays(self) -> tuple[str, int]:
        rows, texts = self.address("rows"), self.address("texts")
        port = int(self.relay("sglang-http", texts))
        self.relay("sglang-detokenizer", rows, texts)
        return rows, port

    def send(self, rid: str, record: Record) -> None:
        rows = record.tables.gather_int32(as_tensor(record.locations))
        self._socket.send_pyobj(("BatchTokenIDOutput", [rid], [rows]), protocol=-1)


class SGLangOpener(Opener[tuple[int, str]]):
    """A client of SGLang's server."""

    def __init__(self) -> None:
        self._server = _Server()

    def open(self, locator: tuple[int, str]) -> Array:
        text = self._server.routes(locator)
        ids = np.frombuffer(pybase64.b64decode(text.encode()), np.int32)
        return ids.reshape(-1, LAYERS, TOP_K)


class VllmWay(ResponseWay):
    """vLLM's path."""

    name = "vLLM native"
    copied: ClassVar = {
        "out of its block store": 1,
        "socket: into the kernel, out of it": 2,
        "numpy.save": 1,
        "base64, decode to str": 2 * BASE64,
        "JSON": BASE64,
    }
    copied_each: ClassVar = {
        "HTTP: into the kernel, out of it": 2 * BASE64,
        "JSON": BASE64,
        "base64 decoded": 1,
        "numpy.load": 1,
    }

    def start_relays(self) -> tuple[str, int]:
        outputs = self.address("outputs")
        return outputs, int(self.relay("vllm-http", outputs))

    def send(self, rid: str, record: Record) -> None:
        rows = record.rows.copy()
        header = msgspec.msgpack.encode((rid, rows.shape, rows.dtype.str))
        self._socket.send_multipart([header, rows], copy=False)


class VllmOpener(Opener[tuple[int, str]]):
    """A client of vLLM's server."""

    def __init__(self) -> None:
        self._server = _Server()

    def open(self, locator: tuple[int, str]) -> Array:
        text = self._server.routes(locator)
        rows: Array = np.load(io.BytesIO(pybase64.b64decode(text)), allow_pickle=False)
        return rows


class _Server:
    """One kept connection to the HTTP process."""

    def __init__(self) -> None:
        self._connection: http.client.HTTPConnection | None = None

    def routes(self, locator: tuple[int, str]) -> str:
        port, path = locator
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        body = response.read()
        if response.status != http.client.OK:
            raise RuntimeError(f"{path}: {response.status}")
        text: str = orjson.loads(body)["meta_info"]["routed_experts"]
        return text


def json_response(rid: str, routes: str) -> bytes:
    """The response's JSON, as ``/generate`` answers."""
    return orjson.dumps(response_with(routes, rid))


def vllm_text(shape: Sequence[int], dtype: str, data: Any) -> str:
    """base64 of ``numpy.save`` of an array that came as a buffer."""
    file = io.BytesIO()
    np.save(file, np.frombuffer(data, dtype).reshape(shape), allow_pickle=False)
    return pybase64.b64encode(file.getbuffer()).decode()
