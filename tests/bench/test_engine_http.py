"""The engine benchmark's client: what comes is cut, counted and timed as it was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from engine_http import Answer, Client, EventCutter, Stream, body, decoded, reached

EVENTS = [b'{"meta_info": {}}', b"[DONE]", b"x" * 5000]
SENT = b"".join(b"data: " + event + b"\n\n" for event in EVENTS)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, len(SENT)])
def test_events_are_the_same_however_the_stream_is_cut(size):
    cutter = EventCutter()
    pieces = [SENT[first : first + size] for first in range(0, len(SENT), size)]
    assert [event for piece in pieces for event in cutter.feed(piece)] == EVENTS


def test_an_answer_without_meta_information_is_shown_as_the_error_that_it_is():
    with pytest.raises(RuntimeError, match="no such tokens"):
        decoded(b'{"error": {"message": "no such tokens"}}')


def test_so_is_one_to_a_request_with_several_prompts():
    assert Answer(0.0, 0, b'[{"meta_info": {}}, {}]').each() == [{"meta_info": {}}, {}]
    with pytest.raises(RuntimeError, match="no such tokens"):
        Answer(0.0, 0, b'{"error": {"message": "no such tokens"}}').each()


# -- over a socket -------------------------------------------------------------------------------

Ask = Callable[[Client], Awaitable[object]]


def served(response: bytes, ask: Ask) -> object:
    """What ``ask`` gives of a server that answers every request with these bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        await reader.readexactly(length)
        writer.write(response)
        await writer.drain()
        writer.close()

    async def run() -> object:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Client(f"http://127.0.0.1:{port}") as client:
                return await ask(client)

    return asyncio.run(run())


def response(content: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nserver: test\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def test_the_bytes_of_a_response_are_those_that_were_sent():
    sent = response(b'{"meta_info": {"prompt_tokens": 3}}')
    answer = served(sent, lambda client: client.generate(body([1, 2, 3], 4, asks=True)))
    assert answer.wire_bytes == len(sent)
    assert answer.decoded()["meta_info"]["prompt_tokens"] == 3


def test_a_stream_keeps_a_time_for_each_event_and_the_last_of_them():
    async def ask(client: Client) -> Stream:
        stream = Stream()
        await client.stream(b"{}", stream)
        return stream

    stream = served(response(SENT), ask)
    assert len(stream.times) == 2
    assert stream.last == EVENTS[-1]


def test_an_http_error_is_raised_with_what_the_server_says():
    with pytest.raises(RuntimeError, match=r"HTTP 400 of /generate.*too long"):
        served(response(b"too long", "400 Bad Request"), lambda client: client.generate(b"{}"))


def test_streams_that_fail_before_they_are_warm_do_not_leave_anyone_waiting():
    async def ask(client: Client) -> None:
        stream = Stream()
        running = asyncio.gather(client.stream(b"{}", stream))
        await reached(running, [stream.warm])

    with pytest.raises(RuntimeError, match="HTTP 503"):
        served(response(b"not yet", "503 Service Unavailable"), ask)
