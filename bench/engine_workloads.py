"""The loads that ``engine.py`` puts on one engine, and what a client of it sees.

Every load returns plain numbers, so that runs of several engines can be written to files and
compared later. Prompts are random tokens, new ones for each run; outputs have fixed lengths
(``ignore_eos``), so every configuration does the same work.

Routes that a load receives go to a `Routes` afterwards, outside what is timed: it checks them
and, with an arena, releases them, so that the arena never fills.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from engine_setup import LongFinishes, Scale

AFTER_FINISH_SECONDS = 0.5  # how long a finish may echo in the steady streams
WARM_TOKENS = 16


class Routes(Protocol):
    """Takes the routes out of finished responses."""

    def take(self, outputs: Iterable[dict[str, Any]], start: int = 0) -> None:
        """``start``: the first token whose row was asked for."""


@dataclass(slots=True)
class Stream:
    """One streamed request: when each chunk came, and the last of them."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    warm: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Load:
    """One engine under load.

    Attributes
    ----------
    asks
        Whether its requests ask for routes.
    """

    engine: Any
    scale: Scale
    asks: bool
    vocabulary: int
    random: np.random.Generator
    routes: Routes

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        ids = self.random.integers(3, self.vocabulary, (count, tokens))
        return [list(map(int, row)) for row in ids]

    def batch(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[int], asks: bool
    ) -> tuple[float, list[dict[str, Any]]]:
        """Send requests at once; seconds until the last is answered, and the answers."""
        self.engine.flush_cache()
        return self.send(prompts, outputs, asks)

    def send(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[int], asks: bool, start: int = 0
    ) -> tuple[float, list[dict[str, Any]]]:
        """`batch` with what the cache holds; rows from token ``start`` on are asked for."""
        began = time.perf_counter()
        answers = self.engine.generate(
            input_ids=list(prompts),
            sampling_params=[_sampling(count) for count in outputs],
            return_routed_experts=asks,
            routed_experts_start_len=start,
        )
        return time.perf_counter() - began, answers

    async def stream(self, prompt: Sequence[int], output: int, into: Stream) -> None:
        """Stream one request, noting when its chunks come."""
        chunks = await self.engine.async_generate(
            input_ids=list(prompt),
            sampling_params=_sampling(output),
            return_routed_experts=self.asks,
            stream=True,
        )
        async for chunk in chunks:
            into.times.append(time.perf_counter())
            into.tokens.append(chunk["meta_info"]["completion_tokens"])
            into.last = chunk
            into.first.set()
            if into.tokens[-1] >= WARM_TOKENS:
                into.warm.set()

    async def steady_streams(
        self, prompt: int, output: int
    ) -> tuple[list[Stream], list[asyncio.Task[None]]]:
        """Start streams and return once all of them decode."""
        streams = [Stream() for _ in range(self.scale.streams)]
        prompts = self.prompts(len(streams), prompt)
        tasks = [
            asyncio.create_task(self.stream(ids, output, stream))
            for ids, stream in zip(prompts, streams, strict=True)
        ]
        await asyncio.gather(*(stream.warm.wait() for stream in streams))
        return streams, tasks

    def run(self, coroutine: Any) -> Any:
        return self.engine.loop.run_until_complete(coroutine)


def _sampling(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}


# -- throughput ----------------------------------------------------------------------------------


def warm_up(load: Load) -> None:
    """Every shape that is timed later, once: kernels are compiled and chosen on first use."""
    scale = load.scale
    _, answers = load.batch(
        load.prompts(scale.batch, scale.prompt), [WARM_TOKENS] * scale.batch, load.asks
    )
    load.routes.take(answers)
    for finishes, _ in scale.finishes:
        _, answers = load.batch(load.prompts(2, finishes.prompt), [4, 4], load.asks)
        load.routes.take(answers)


def throughput(load: Load, *, asks: bool) -> dict[str, Any]:
    """A full batch of equal requests: all finish in one step."""
    scale = load.scale
    prompts = load.prompts(scale.batch, scale.prompt)
    return _timed_batch(load, prompts, [scale.output] * scale.batch, asks)


def steady(load: Load) -> dict[str, Any]:
    """More requests than fit at once, of many lengths: finishes are spread out."""
    scale, count = load.scale, load.scale.steady_requests
    outputs = np.random.default_rng(11).integers(scale.output // 2, scale.output * 3 // 2, count)
    return _timed_batch(load, load.prompts(count, scale.prompt), list(map(int, outputs)), load.asks)


def several_turns(load: Load, *, deltas: bool) -> dict[str, Any]:
    """Conversations, all at once; each turn's prompt is everything before it and something new.

    Every turn asks for the rows of its whole prompt, or with ``deltas`` for those that no former
    turn could have: from the last token of the former turn on.
    """
    scale = load.scale.turns
    load.engine.flush_cache()
    conversations: list[list[int]] = [[] for _ in range(scale.conversations)]
    seconds, sizes = 0.0, []
    for _ in range(scale.turns):
        start = max(0, len(conversations[0]) - 1) if deltas else 0
        added = load.prompts(scale.conversations, scale.prompt)
        prompts = [old + new for old, new in zip(conversations, added, strict=True)]
        outputs = [scale.output] * scale.conversations
        took, answers = load.send(prompts, outputs, load.asks, start)
        seconds += took
        if load.asks:
            load.routes.take(answers, start)
        sizes.append(route_bytes(answers[0]))
        conversations = [
            prompt + answer["output_ids"] for prompt, answer in zip(prompts, answers, strict=True)
        ]
    tokens = scale.conversations * scale.turns * scale.output
    return {
        "deltas": deltas,
        "tokens_per_second": tokens / seconds,
        "route_bytes": sizes,
    }


def _timed_batch(
    load: Load, prompts: list[list[int]], outputs: list[int], asks: bool
) -> dict[str, Any]:
    seconds, answers = load.batch(prompts, outputs, asks)
    tokens = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    if tokens != sum(outputs):
        raise AssertionError(f"{tokens} tokens came, not {sum(outputs)}")
    if asks:
        load.routes.take(answers)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "route_bytes": [route_bytes(answer) for answer in answers[:1]],
    }


def route_bytes(answer: dict[str, Any]) -> int:
    """Bytes that routes add to a response's JSON: ``,"routed_experts":"..."``."""
    text = answer["meta_info"].get("routed_experts")
    return 0 if text is None else len(text) + len(',"routed_experts":""')


# -- inter-token latency -------------------------------------------------------------------------


def inter_token(load: Load, finishes: LongFinishes) -> dict[str, Any]:
    """Gaps between the chunks of steady streams while long requests finish beside them.

    Only the time between a phase's last prefill and `AFTER_FINISH_SECONDS` after its last finish
    counts: what stands out is what a finish costs, not what a prefill costs.
    """
    load.engine.flush_cache()
    streams, longs, windows = load.run(_finish_beside_streams(load, finishes))
    # Their own end is no gap of a running stream.
    last = min(stream.times[-1] for stream in streams) - load.scale.settle_seconds
    cut = [(began, min(end, last)) for began, end in windows]
    if load.asks:
        load.routes.take(stream.last for stream in (*streams, *longs))
    gaps = [gap for window in cut for stream in streams for gap in _gaps(stream, *window)]
    ends = [long.times[-1] for long in longs]
    return {
        "name": finishes.name,
        "gaps": [round(gap * 1e3, 4) for gap in gaps],
        "near_finish": [round(_largest_near(streams, end) * 1e3, 4) for end in ends],
        "windows": cut,
        "windows_cut": sum(after != before for after, before in zip(cut, windows, strict=True)),
        "finish_times": ends,
        "route_bytes": [route_bytes(long.last) for long in longs[:1]],
    }


async def _finish_beside_streams(
    load: Load, finishes: LongFinishes
) -> tuple[list[Stream], list[Stream], list[tuple[float, float]]]:
    streams, tasks = await load.steady_streams(finishes.stream_prompt, finishes.stream_output)
    windows, longs = [], []
    for outputs in finishes.phases:
        phase = [Stream() for _ in outputs]
        prompts = load.prompts(len(outputs), finishes.prompt)
        running = [
            asyncio.create_task(load.stream(ids, output, stream))
            for ids, output, stream in zip(prompts, outputs, phase, strict=True)
        ]
        await asyncio.gather(*(stream.first.wait() for stream in phase))
        began = time.perf_counter() + load.scale.settle_seconds
        await asyncio.gather(*running)
        end = max(stream.times[-1] for stream in phase)
        windows.append((began, end + echo_seconds(load.scale)))
        longs += phase
        await asyncio.sleep(echo_seconds(load.scale))
    await asyncio.gather(*tasks)
    return streams, longs, windows


def echo_seconds(scale: Scale) -> float:
    """A tenth on the small scale, whose streams are short."""
    return min(AFTER_FINISH_SECONDS, 5 * scale.settle_seconds)


def _gaps(stream: Stream, began: float, end: float) -> list[float]:
    return [
        after - before
        for before, after in zip(stream.times, stream.times[1:], strict=False)
        if before >= began and after <= end
    ]


def _largest_near(streams: list[Stream], finish: float) -> float:
    return max(
        (gap for stream in streams for gap in _gaps(stream, finish - 0.12, finish + 0.3)),
        default=0.0,
    )


# -- from the last token to the rows -------------------------------------------------------------


class Reader(Protocol):
    """A trainer process that is given what a response carries."""

    def read(self, routes: str, where: str) -> dict[str, float]: ...


def latency(load: Load, reader: Reader | None, places: Sequence[str], *, beside: bool) -> list[Any]:
    """One request after the other; its routes go to the trainer as soon as it is answered.

    The prompt is cached, so a request takes some 16 decode steps. ``places`` are where the
    trainer wants the rows in turn, ``host`` or ``cuda``. ``beside`` runs requests next to steady
    streams, half as many.
    """
    result: list[Any] = load.run(_latency(load, reader, places, beside))
    return result


async def _latency(
    load: Load, reader: Reader | None, places: Sequence[str], beside: bool
) -> list[Any]:
    repeats = load.scale.latency_repeats // (2 if beside else 1)
    measured: list[Any] = []
    prompts = {name: load.prompts(1, tokens)[0] for name, tokens in load.scale.latency_prompts}
    for prompt in prompts.values():
        for place in places:
            await _one_delivery(load, prompt, reader, place)
    for name, prompt in prompts.items():
        streams: list[Stream] = []
        tasks: list[asyncio.Task[None]] = []
        if beside:
            # New ones for each length, or the first would have to last very long.
            output = 60 + 20 * repeats * len(places)
            streams, tasks = await load.steady_streams(64, output)
        for place in list(places) * repeats:
            one = await _one_delivery(load, prompt, reader, place)
            measured.append({**one, "name": name, "place": place, "beside": beside})
        await asyncio.gather(*tasks)
        if load.asks:
            load.routes.take(stream.last for stream in streams)
    return measured


async def _one_delivery(
    load: Load, prompt: Sequence[int], reader: Reader | None, place: str
) -> dict[str, Any]:
    stream = Stream()
    await load.stream(prompt, WARM_TOKENS, stream)
    answered = stream.times[-1]
    gaps = np.diff(stream.times[2:])
    one = {
        "route_bytes": route_bytes(stream.last),
        # How much later than usual the last chunk comes: what the engine spends on its routes.
        "last_gap": float(gaps[-1] - np.median(gaps)) if len(gaps) > 2 else 0.0,
    }
    if reader is not None:
        answer = reader.read(stream.last["meta_info"]["routed_experts"], place)
        one |= {"rows": answer["rows"], "delivery": answer["at"] - answered}
        one |= {"in_trainer": answer["seconds"]}
        expected = len(prompt) + WARM_TOKENS - 1
        if answer["rows"] != expected:
            raise AssertionError(f"{answer['rows']} rows came, not {expected}")
    return one
