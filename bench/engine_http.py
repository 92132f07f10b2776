"""Requests to an engine's HTTP server, and when what they bring arrives.

Problem: what a client does with an answer must not be taken for the engine's time. A native
answer of 32K tokens is an event of 67 MB, and decoding it holds up everything else that the
client's process does.

Approach: bodies are encoded before they are sent; what comes is kept as bytes, with the time at
which its last byte was there, and decoded by whoever wants it once nothing is timed. Each byte
of a stream is looked at once, however long its event is. There is no limit on connections, on
what is read ahead, or on time. Streams whose gaps are measured are read by another process than
the requests beside them (`engine_streams`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
import orjson

WARM_EVENTS = 16
FLUSH_SECONDS = 30
KEEP_ALIVE_SECONDS = 2.0  # the server closes a connection that is idle for 5
READ_AHEAD = 1 << 28  # bytes
DATA, DONE = b"data: ", b"[DONE]"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response.

    Attributes
    ----------
    received
        CLOCK_MONOTONIC seconds at which its last byte had come.
    head
        Bytes before its body: status line and headers.
    """

    received: float
    head: int
    body: bytes

    @property
    def wire_bytes(self) -> int:
        """Bytes of the HTTP response; its body comes in one piece of declared length."""
        return self.head + len(self.body)

    def decoded(self) -> dict[str, Any]:
        return decoded(self.body)

    def each(self) -> list[dict[str, Any]]:
        """The answers to a request with several prompts."""
        answers: list[dict[str, Any]] = orjson.loads(self.body)
        if not isinstance(answers, list):
            raise RuntimeError(f"the server answered {self.body[:500]!r}")
        return answers


@dataclass(slots=True)
class Stream:
    """One streamed request: when each of its events had come, and the last of them."""

    times: list[float] = field(default_factory=list)
    last: bytes = b""
    first: asyncio.Event = field(default_factory=asyncio.Event)
    warm: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, event: bytes, at: float) -> None:
        self.times.append(at)
        self.last = event
        self.first.set()
        if len(self.times) == WARM_EVENTS:
            self.warm.set()


async def reached(running: asyncio.Future[Any], events: Iterable[asyncio.Event]) -> None:
    """Wait for what running streams set; one that fails before raises here."""
    for event in events:
        waiting = asyncio.create_task(event.wait())
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            await running


class EventCutter:
    """Cuts a response that comes in pieces into the data of its events, one line each."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The events whose lines end in this piece."""
        *ended, rest = piece.split(b"\n")
        for end in ended:
            line = b"".join((*self._begun, end))
            self._begun.clear()
            if line:  # an empty one stands between events
                yield line.removeprefix(DATA)
        self._begun.append(rest)


class Client:
    """One process's connections to one server; use it with ``async with``."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            self._url,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(),
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            read_bufsize=READ_AHEAD,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def generate(self, body: bytes) -> Answer:
        """The answer to a request that is not streamed; an HTTP error raises."""
        async with self._session.post("/generate", data=body) as response:
            content = await response.read()
            received = time.perf_counter()
        _check(response, content)
        return Answer(received, _head_bytes(response), content)

    async def events(self, body: bytes) -> AsyncIterator[tuple[bytes, float]]:
        """Each event of a streamed request, and when it had come; an HTTP error raises."""
        async with self._session.post("/generate", data=body) as response:
            if response.status != 200:
                _check(response, await response.read())
            cutter = EventCutter()
            async for piece in response.content.iter_any():
                at = time.perf_counter()
                for event in cutter.feed(piece):
                    if event != DONE:
                        yield event, at

    async def stream(self, body: bytes, into: Stream) -> None:
        """Stream a request to its end."""
        async for event, at in self.events(body):
            into.add(event, at)

    async def flush_cache(self) -> None:
        """Empty the prefix cache, once nothing runs any more."""
        address = f"/flush_cache?timeout={FLUSH_SECONDS}"
        async with self._session.post(address) as response:
            _check(response, await response.read())


def body(
    prompt: Sequence[int] | Sequence[Sequence[int]],
    tokens: int,
    *,
    asks: bool,
    start: int = 0,
    stream: bool = False,
) -> bytes:
    """A request for exactly so many tokens, of each prompt where there are several; rows are asked
    for from token ``start`` on.
    """
    return orjson.dumps(
        {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
            "return_routed_experts": asks,
            "routed_experts_start_len": start,
            "stream": stream,
        }
    )


def decoded(body: bytes) -> dict[str, Any]:
    """The answer that is in a response's body, or in an event."""
    answer: dict[str, Any] = orjson.loads(body)
    if "meta_info" not in answer:
        raise RuntimeError(f"the server answered {body[:500]!r}")
    return answer


def _check(response: aiohttp.ClientResponse, content: bytes) -> None:
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status} of {response.url.path}: {content[:500]!r}")


def _head_bytes(response: aiohttp.ClientResponse) -> int:
    status = f"HTTP/1.1 {response.status} {response.reason}\r\n"
    lines = sum(len(name) + len(value) + len(": \r\n") for name, value in response.raw_headers)
    return len(status) + lines + len("\r\n")
