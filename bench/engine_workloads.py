"""The loads that ``engine.py`` puts on one engine over HTTP, and what a client of it sees.

Every load returns plain numbers, so that runs of several engines can be written to files and
compared later. Prompts are random tokens, new ones for each run; outputs have fixed lengths
(``ignore_eos``), so every configuration does the same work. Requests are streamed where the time
of each token counts, and not where only their end does.

Routes that a load receives go to a `Routes` afterwards, outside what is timed: it checks them
and, with an arena, releases them, so that the arena never fills.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from engine_http import Answer, Client, Stream, body, decoded, reached
from engine_setup import LongFinishes, Scale
from engine_streams import EndedStream, SteadyStreams

AFTER_FINISH_SECONDS = 0.5  # how long a finish may echo in the steady streams
WARM_TOKENS = 16


class Routes(Protocol):
    """Takes the routes out of finished responses."""

    def take(self, answers: Iterable[dict[str, Any]], start: int = 0) -> None:
        """``start``: the first token whose row was asked for."""

    def opened(self, answers: Iterable[dict[str, Any]]) -> float | None:
        """When the records of all of them could be opened; None where there are none."""


@dataclass(slots=True)
class Load:
    """One engine under load.

    Attributes
    ----------
    asks
        Whether its requests ask for routes.
    """

    client: Client
    scale: Scale
    asks: bool
    vocabulary: int
    random: np.random.Generator
    routes: Routes

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        ids = self.random.integers(3, self.vocabulary, (count, tokens))
        return [list(map(int, row)) for row in ids]

    def streamed(self, prompt: int, outputs: Sequence[int]) -> list[bytes]:
        """Requests to be streamed: new prompts of so many tokens, and outputs of these lengths."""
        prompts = self.prompts(len(outputs), prompt)
        return [
            body(ids, output, asks=self.asks, stream=True)
            for ids, output in zip(prompts, outputs, strict=True)
        ]

    async def send(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[int], asks: bool, start: int = 0
    ) -> tuple[float, list[Answer]]:
        """Send requests at once; seconds until the last is answered, and the answers.

        The rows of their tokens from ``start`` on are asked for.
        """
        bodies = [
            body(ids, output, asks=asks, start=start)
            for ids, output in zip(prompts, outputs, strict=True)
        ]
        began = time.perf_counter()
        answers = await asyncio.gather(*map(self.client.generate, bodies))
        return max(answer.received for answer in answers) - began, answers


# -- throughput ----------------------------------------------------------------------------------


async def warm_up(load: Load) -> None:
    """Every shape that is timed later, once: kernels are compiled and chosen on first use."""
    scale = load.scale
    shapes = [(scale.batch, scale.prompt, WARM_TOKENS)]
    shapes += [(2, finishes.prompt, 4) for finishes, _ in scale.finishes]
    for count, prompt, output in shapes:
        await load.client.flush_cache()
        _, answers = await load.send(load.prompts(count, prompt), [output] * count, load.asks)
        if load.asks:
            load.routes.take(answer.decoded() for answer in answers)


async def throughput(load: Load, *, asks: bool) -> dict[str, Any]:
    """A full batch of equal requests: all finish in one step."""
    scale = load.scale
    prompts = load.prompts(scale.batch, scale.prompt)
    return await _timed_batch(load, prompts, [scale.output] * scale.batch, asks)


async def together(load: Load) -> dict[str, Any]:
    """The same batch in one HTTP request. The scheduler gets all of it in one message, so that each
    load is the same forwards, whatever arrives when.
    """
    scale = load.scale
    prompts = load.prompts(scale.batch, scale.prompt)
    whole = body(prompts, scale.output, asks=load.asks)
    await load.client.flush_cache()
    began = time.perf_counter()
    answer = await load.client.generate(whole)
    seconds = answer.received - began
    tokens = scale.batch * scale.output
    return _batch_figures(load, seconds, [answer], answer.each(), tokens, load.asks)


async def steady(load: Load) -> dict[str, Any]:
    """More requests than fit at once, of many lengths: finishes are spread out."""
    scale, count = load.scale, load.scale.steady_requests
    lengths = np.random.default_rng(11).integers(scale.output // 2, scale.output * 3 // 2, count)
    prompts = load.prompts(count, scale.prompt)
    return await _timed_batch(load, prompts, list(map(int, lengths)), load.asks)


async def several_turns(load: Load, *, deltas: bool) -> dict[str, Any]:
    """Conversations, all at once; each turn's prompt is everything before it and something new.

    Every turn asks for the rows of its whole prompt, or with ``deltas`` for those that no former
    turn could have: from the last token of the former turn on.
    """
    scale = load.scale.turns
    await load.client.flush_cache()
    conversations: list[list[int]] = [[] for _ in range(scale.conversations)]
    seconds, sizes, whole = 0.0, [], []
    for _ in range(scale.turns):
        start = max(0, len(conversations[0]) - 1) if deltas else 0
        added = load.prompts(scale.conversations, scale.prompt)
        prompts = [old + new for old, new in zip(conversations, added, strict=True)]
        outputs = [scale.output] * scale.conversations
        took, received = await load.send(prompts, outputs, load.asks, start)
        seconds += took
        answers = [answer.decoded() for answer in received]
        if load.asks:
            load.routes.take(answers, start)
        sizes.append(route_bytes(answers[0]))
        whole.append(received[0].wire_bytes)
        conversations = [
            prompt + answer["output_ids"] for prompt, answer in zip(prompts, answers, strict=True)
        ]
    tokens = scale.conversations * scale.turns * scale.output
    return {
        "deltas": deltas,
        "tokens_per_second": tokens / seconds,
        "route_bytes": sizes,
        "response_bytes": whole,
    }


async def _timed_batch(
    load: Load, prompts: list[list[int]], outputs: list[int], asks: bool
) -> dict[str, Any]:
    await load.client.flush_cache()
    seconds, received = await load.send(prompts, outputs, asks)
    answers = [answer.decoded() for answer in received]
    return _batch_figures(load, seconds, received, answers, sum(outputs), asks)


def _batch_figures(
    load: Load,
    seconds: float,
    received: Sequence[Answer],
    answers: Sequence[dict[str, Any]],
    expected: int,
    asks: bool,
) -> dict[str, Any]:
    tokens = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    if tokens != expected:
        raise AssertionError(f"{tokens} tokens came, not {expected}")
    opened = load.routes.opened(answers) if asks else None
    if asks:
        load.routes.take(answers)
    last = max(answer.received for answer in received)
    return {
        "seconds": seconds,
        "last_open_seconds": None if opened is None else opened - last,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "route_bytes": route_bytes(answers[0]),
        "response_bytes": received[0].wire_bytes,
    }


def route_bytes(answer: dict[str, Any]) -> int:
    """Bytes that routes add to a response's JSON: ``,"routed_experts":"..."``."""
    text = answer["meta_info"].get("routed_experts")
    return 0 if text is None else len(text) + len(',"routed_experts":""')


# -- inter-token latency -------------------------------------------------------------------------


async def inter_token(load: Load, beside: SteadyStreams, finishes: LongFinishes) -> dict[str, Any]:
    """Gaps between the chunks of steady streams while long requests finish beside them.

    Only the time between a phase's last prefill and `AFTER_FINISH_SECONDS` after its last finish
    counts: what stands out is what a finish costs, not what a prefill costs.
    """
    scale = load.scale
    await load.client.flush_cache()
    outputs = [finishes.stream_output] * scale.streams
    beside.start(load.streamed(finishes.stream_prompt, outputs))
    longs, windows = await _finish_beside_streams(load, finishes)
    streams = beside.ended()
    # Their own end is no gap of a running stream.
    last = min(stream.times[-1] for stream in streams) - scale.settle_seconds
    cut = [(began, min(end, last)) for began, end in windows]
    answers = [decoded(long.last) for long in longs]
    answers += [decoded(stream.last) for stream in streams]
    if load.asks:
        load.routes.take(answers)
    gaps = [gap for window in cut for stream in streams for gap in _gaps(stream, *window)]
    return {
        "name": finishes.name,
        "gaps": [round((end - begin) * 1e3, 4) for begin, end in gaps],
        "gap_ends": [round(end, 5) for _, end in gaps],
        "windows": cut,
        "windows_cut": sum(after != before for after, before in zip(cut, windows, strict=True)),
        "finish_times": [long.times[-1] for long in longs],
        "route_bytes": route_bytes(answers[0]),
    }


async def _finish_beside_streams(
    load: Load, finishes: LongFinishes
) -> tuple[list[Stream], list[tuple[float, float]]]:
    windows, longs = [], []
    for outputs in finishes.phases:
        phase = [Stream() for _ in outputs]
        bodies = load.streamed(finishes.prompt, outputs)
        running = asyncio.gather(*map(load.client.stream, bodies, phase))
        await reached(running, (stream.first for stream in phase))
        began = time.perf_counter() + load.scale.settle_seconds
        await running
        end = max(stream.times[-1] for stream in phase)
        windows.append((began, end + echo_seconds(load.scale)))
        longs += phase
        await asyncio.sleep(echo_seconds(load.scale))
    return longs, windows


def echo_seconds(scale: Scale) -> float:
    """A tenth on the small scale, whose streams are short."""
    return min(AFTER_FINISH_SECONDS, 5 * scale.settle_seconds)


def _gaps(stream: EndedStream, began: float, end: float) -> list[tuple[float, float]]:
    """Between which times a stream had no event, in a window."""
    return [
        (before, after)
        for before, after in zip(stream.times, stream.times[1:], strict=False)
        if before >= began and after <= end
    ]


# -- from the last token to the rows -------------------------------------------------------------


class Reader(Protocol):
    """A trainer process that is given what a response carries."""

    def read(self, routes: str, where: str) -> dict[str, float]: ...


async def latency(
    load: Load, reader: Reader | None, places: Sequence[str], beside: SteadyStreams | None
) -> list[Any]:
    """One request after the other; its routes go to the trainer as soon as it is answered.

    The prompt is cached, so a request takes some 16 decode steps. ``places`` are where the
    trainer wants the rows in turn, ``host`` or ``cuda``. With streams ``beside`` there are half
    as many requests.
    """
    repeats = load.scale.latency_repeats // (2 if beside else 1)
    measured: list[Any] = []
    prompts = {name: load.prompts(1, tokens)[0] for name, tokens in load.scale.latency_prompts}
    whole = {name: await _whole_response(load, prompt) for name, prompt in prompts.items()}
    for prompt in prompts.values():
        for place in places:
            await _one_delivery(load, prompt, reader, place)
    for name, prompt in prompts.items():
        if beside:
            # New ones for each length, or the first would have to last very long.
            output = 60 + 20 * repeats * len(places)
            beside.start(load.streamed(64, [output] * load.scale.streams))
        for place in list(places) * repeats:
            one = await _one_delivery(load, prompt, reader, place)
            of_load = {"name": name, "place": place, "beside": beside is not None}
            measured.append({**one, **of_load, "response_bytes": whole[name]})
        if beside:
            streams = beside.ended()
            if load.asks:
                load.routes.take(decoded(stream.last) for stream in streams)
    return measured


async def _whole_response(load: Load, prompt: Sequence[int]) -> int:
    """Bytes of the response of such a request when it is not streamed."""
    _, (answer,) = await load.send([prompt], [WARM_TOKENS], load.asks)
    if load.asks:
        load.routes.take([answer.decoded()])
    return answer.wire_bytes


async def _one_delivery(
    load: Load, prompt: Sequence[int], reader: Reader | None, place: str
) -> dict[str, Any]:
    times: list[float] = []
    one: dict[str, Any] = {}
    async for event, at in load.client.events(
        body(prompt, WARM_TOKENS, asks=load.asks, stream=True)
    ):
        times.append(at)
        answer = decoded(event)
        if answer["meta_info"]["finish_reason"] is not None:
            one["route_bytes"] = route_bytes(answer)
            if reader is not None:
                one |= _delivered(reader.read(answer["meta_info"]["routed_experts"], place), at)
    gaps = np.diff(times[2:])
    # How much later than usual the last chunk comes: what the engine spends on its routes.
    one["last_gap"] = float(gaps[-1] - np.median(gaps)) if len(gaps) > 2 else 0.0
    expected = len(prompt) + WARM_TOKENS - 1
    if one.get("rows", expected) != expected:
        raise AssertionError(f"{one['rows']} rows came, not {expected}")
    return one


def _delivered(read: dict[str, float], answered: float) -> dict[str, float]:
    """From a response's last byte to its rows: decoding its JSON is part of that."""
    delivery, inside = read["at"] - answered, read["seconds"]
    return {"rows": read["rows"], "delivery": delivery, "in_trainer": inside}
