"""Steady streams in a process of their own, so that nothing but the engine makes them late.

Problem: inter-token latency is what a client sees, and one that receives native answers of 67 MB
beside its streams reads their events late itself.

Approach: a process that does nothing but note when events come; their bodies are not looked at,
and no garbage is collected meanwhile. It says when all of its streams decode, and hands over
their times, with the last event of each, when they have ended. The requests that finish beside
them belong to the process that asks. CLOCK_MONOTONIC is the same in both.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from engine_http import Client, Stream, reached
from piped_processes import PipedProcesses

ANSWER_SECONDS = 400.0  # for all streams to get warm, and to end


@dataclass(frozen=True, slots=True)
class EndedStream:
    """When each event of a stream had come, in CLOCK_MONOTONIC seconds, and its last event."""

    times: list[float]
    last: bytes


class SteadyStreams:
    """The process that reads them, while it is needed; ``close`` ends it."""

    def __init__(self, url: str) -> None:
        self._process = PipedProcesses(1, _serve, url, seconds=ANSWER_SECONDS)

    def start(self, bodies: Sequence[bytes]) -> None:
        """Start one stream for each of these requests; returns once all of them decode."""
        self._process.send(list(bodies))
        self._process.answers()

    def ended(self) -> list[EndedStream]:
        """Wait for their ends."""
        (streams,) = self._process.answers()
        return [EndedStream(times, last) for times, last in streams]

    def close(self) -> None:
        self._process.close()


def _serve(parent: Connection, url: str) -> None:
    gc.disable()
    while True:
        try:
            bodies = parent.recv()
        except EOFError:
            return
        parent.send(asyncio.run(_stream_all(parent, url, bodies)))


async def _stream_all(parent: Connection, url: str, bodies: Sequence[bytes]) -> Any:
    streams = [Stream() for _ in bodies]
    async with Client(url) as client:
        running = asyncio.gather(*map(client.stream, bodies, streams))
        await reached(running, (stream.warm for stream in streams))
        parent.send("warm")
        await running
    return [(stream.times, stream.last) for stream in streams]
