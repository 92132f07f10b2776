"""What the demo asks the engine over HTTP: conversations of two turns with shared prompts.

Problem: routes are easy to get right for one fresh prompt. They go wrong, if they do, where
a request's first tokens were computed by another request (a shared prefix), where it
continues an earlier one (a second turn), and where many of different lengths run at once.

Approach: conversations that share one of a few system prompts, with questions and answers of
many lengths, one of them long. Prompts are token ids, as RL trainers send them; each request
has a rid that the client chose. ``together`` sends all conversations at once; ``one_by_one``
sends one request after the other, so that a second server computes the very same batches.
Same seed, same prompts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
from tokenizers import Tokenizer

SYSTEM_PROMPTS = (
    "You solve word problems step by step and write the answer on the last line. ",
    "You are given a function and its tests; find out why a test fails and mend it. ",
    "You read a proof line by line and name the first line that does not follow. ",
)
TEXT = (
    "a farmer sells seven boxes of apples and keeps two for the winter while her neighbour "
    "counts every box twice so the sum of both is odd if the list is empty return zero else "
    "take the first item and compare it with the last one hence the sequence is bounded"
)
TOKENS_A_WORD = 3  # with the demo's tokenizer, about
REQUEST_TIMEOUT = 240.0

OnFinished = Callable[["Finished"], None]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids of the first prompt and of what the user says next, and lengths of answers."""

    name: str
    first: list[int]
    follow_up: list[int]
    answers: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Finished:
    """A response as it arrived; ``received`` is the CLOCK_MONOTONIC time at which it was whole."""

    rid: str
    body: bytes
    received: float

    @property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = orjson.loads(self.body)["meta_info"]
        return meta

    @property
    def output_ids(self) -> list[int]:
        ids: list[int] = orjson.loads(self.body)["output_ids"]
        return ids


def make_conversations(
    model: Path, count: int, name: str, *, usual: int, longest: int, seed: int
) -> list[Conversation]:
    """``count`` conversations.

    Their first questions have about ``usual // 4`` to ``usual`` tokens, the last one's has
    ``longest``.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    chance = random.Random(seed)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text).ids
        return found

    def words(number: int) -> str:
        return " ".join(chance.choices(TEXT.split(), k=number))

    made = []
    for index in range(count):
        system = SYSTEM_PROMPTS[index % len(SYSTEM_PROMPTS)] * 3
        tokens = longest if index == count - 1 else chance.randint(usual // 4, usual)
        made.append(
            Conversation(
                name=f"{name}-{index:02d}",
                first=ids(
                    f"<|system|>{system}<|user|>{words(tokens // TOKENS_A_WORD)}<|assistant|>"
                ),
                follow_up=ids(f"<|user|>{words(chance.randint(5, 30))}<|assistant|>"),
                answers=(chance.randint(8, 32), chance.randint(8, 24)),
            )
        )
    return made


def together(url: str, conversations: Sequence[Conversation], on_finished: OnFinished) -> None:
    """Hold all conversations at the same time."""

    async def hold_all() -> None:
        async with _client(url) as client:
            await asyncio.gather(*(_hold(client, each, on_finished) for each in conversations))

    asyncio.run(hold_all())


def one_by_one(url: str, conversations: Sequence[Conversation], on_finished: OnFinished) -> None:
    """Hold one conversation after the other, on an engine whose prefix cache is empty."""

    async def hold_each() -> None:
        async with _client(url) as client:
            (await client.post("/flush_cache")).raise_for_status()
            for each in conversations:
                await _hold(client, each, on_finished)

    asyncio.run(hold_each())


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=REQUEST_TIMEOUT, limits=limits)


async def _hold(
    client: httpx.AsyncClient, conversation: Conversation, on_finished: OnFinished
) -> None:
    """Two turns; the second prompt is the first one, its answer and the follow-up."""
    prompt = conversation.first
    for turn, length in enumerate(conversation.answers, start=1):
        finished = await _generate(client, f"{conversation.name}-turn-{turn}", prompt, length)
        on_finished(finished)
        prompt = [*prompt, *finished.output_ids, *conversation.follow_up]


async def _generate(
    client: httpx.AsyncClient, rid: str, prompt: list[int], length: int
) -> Finished:
    request = {
        "rid": rid,
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": length, "ignore_eos": True},
        "return_routed_experts": True,
    }
    response = await client.post("/generate", json=request)
    received = time.monotonic()
    return Finished(rid, response.raise_for_status().content, received)
