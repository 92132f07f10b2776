"""The processes between an engine's scheduler and its client, as `transport_responses` has them.

    python bench/transport_relays.py sglang-detokenizer ROWS TEXTS
    python bench/transport_relays.py sglang-http TEXTS
    python bench/transport_relays.py vllm-http OUTPUTS

Arguments are zmq addresses. An HTTP process says its port, the detokenizer that it listens. A
response is asked for at ``/RID/TIMES``, also before it is there, and forgotten when it has been
asked for so many times.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pybase64
import uvicorn
import zmq
import zmq.asyncio
from crash_processes import end_with
from memory_watch import trim
from transport_responses import TRIM, json_response, vllm_text

KEPT_SECONDS = 3600  # a reader's connection may rest while other ways are measured

Take = Callable[[Any], Awaitable[tuple[str, str]]]


def sglang_detokenizer(rows: str, texts: str) -> None:
    """Base64 of every request's rows, on to the HTTP process."""
    context = zmq.Context()
    incoming, outgoing = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for each in (incoming, outgoing):
        each.set_hwm(0)
    incoming.bind(rows)
    outgoing.connect(texts)
    print("listening", flush=True)
    while True:
        _, rids, payloads = incoming.recv_pyobj()
        encoded = [pybase64.b64encode(item.numpy().tobytes()).decode() for item in payloads]
        outgoing.send_pyobj(("BatchStrOutput", rids, encoded), protocol=pickle.HIGHEST_PROTOCOL)


async def from_detokenizer(incoming: Any) -> tuple[str, str]:
    _, (rid,), (text,) = await incoming.recv_pyobj()
    return rid, text


async def from_engine_core(incoming: Any) -> tuple[str, str]:
    header, data = await incoming.recv_multipart(copy=False)
    rid, shape, dtype = msgspec.msgpack.decode(header.buffer)
    return rid, vllm_text(shape, dtype, data.buffer)


class HttpProcess:
    """Takes finished requests from a socket and answers with them, as an ASGI application."""

    def __init__(self, address: str, take: Take) -> None:
        self._address, self._take = address, take
        self._bodies: dict[str, asyncio.Future[bytes]] = {}
        self._asked: dict[str, int] = {}

    async def serve(self) -> None:
        incoming = zmq.asyncio.Context().socket(zmq.PULL)
        incoming.set_hwm(0)
        incoming.bind(self._address)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(
            self,
            log_level="error",
            lifespan="off",
            loop="none",
            timeout_keep_alive=KEPT_SECONDS,
        )
        await asyncio.gather(
            uvicorn.Server(config).serve(sockets=[listening]), self._receive(incoming)
        )

    async def _receive(self, incoming: Any) -> None:
        while True:
            rid, text = await self._take(incoming)
            self._body(rid).set_result(json_response(rid, text))

    def _body(self, rid: str) -> asyncio.Future[bytes]:
        return self._bodies.setdefault(rid, asyncio.get_running_loop().create_future())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        _, rid, times = scope["path"].split("/")
        body = await self._body(rid)
        self._asked[rid] = self._asked.get(rid, 0) + 1
        if self._asked[rid] == int(times):
            del self._asked[rid], self._bodies[rid]
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def main() -> None:
    role, address, *to = sys.argv[1:]
    end_with(os.getppid())
    signal.signal(TRIM, lambda *_: trim())
    if role == "sglang-detokenizer":
        sglang_detokenizer(address, *to)
        return
    import uvloop

    take = from_detokenizer if role == "sglang-http" else from_engine_core
    uvloop.run(HttpProcess(address, take).serve())


if __name__ == "__main__":
    main()
