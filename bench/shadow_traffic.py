"""Requests to an engine of the campaign, and what each kind of traffic asks of it.

The traffic mixes what moves KV locations about. Every record is opened, checked for what holds
of any record, and released; whether its rows are the native path's is the engine's own
comparison, and with DP attention transformers' as well (``reference_routes``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from engine_memory import gpu_used
from reference_routes import ReferenceRoutes

from shmroute import RouteFailed, ShmRouteReader
from shmroute.ticket import Ticket, decode

Outputs = list[dict[str, Any]]

QUICK = 8  # of so many requests one is sent


class Client:
    """Requests to the engine; every record is opened, checked and released.

    Parameters
    ----------
    allow_missing
        Records with missing rows are opened, too.
    quick
        Fewer requests at once.

    Attributes
    ----------
    agreement
        Of the records that were compared with transformers, by arena: the least share of
        choices that are the same.
    """

    def __init__(
        self,
        engine: Any,
        model: Path,
        *,
        allow_missing: bool = False,
        quick: bool = False,
        seed: int = 0,
    ) -> None:
        self.engine, self.model = engine, model
        self._allow_missing, self._quick = allow_missing, quick
        self.random = np.random.default_rng(seed)
        self._vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
        self.rows = self.requests = self.failed = self.inline = 0
        self.agreement: dict[str, float] = {}

    def some(self, count: int) -> range:
        """So many, or with ``quick`` a part of them, at least two."""
        return range(max(2, count // QUICK) if self._quick else count)

    def prompt(self, length: int) -> list[int]:
        return list(map(int, self.random.integers(3, self._vocabulary, length)))

    def send(
        self, prompts: Sequence[list[int]], outputs: int | Sequence[int], start: int = 0
    ) -> Outputs:
        """Send all at once, wait for all, take their routes."""
        replies = self._generate(prompts, outputs, start)
        for reply in replies:
            self.take(reply, start)
        return replies

    def compare(
        self, reference: ReferenceRoutes, prompts: Sequence[list[int]], outputs: int
    ) -> None:
        """Send all at once, and let transformers route the same tokens."""
        for prompt, reply in zip(prompts, self._generate(prompts, outputs), strict=True):
            with ShmRouteReader(reply, timeout=20) as routes:
                ticket = decode(routes.ticket)
                where = ticket.segment.base if isinstance(ticket, Ticket) else "inline"
                tokens = [*prompt, *reply["output_ids"]][:-1]
                share = reference.agreement(tokens, routes.numpy())
            self.agreement[where] = min(share, self.agreement.get(where, 1.0))
            self.take(reply, 0)

    def _generate(
        self, prompts: Sequence[list[int]], outputs: int | Sequence[int], start: int = 0
    ) -> Outputs:
        lengths = [outputs] * len(prompts) if isinstance(outputs, int) else list(outputs)
        replies: Outputs = self.engine.generate(
            input_ids=list(prompts),
            sampling_params=[_sampling(length) for length in lengths],
            return_routed_experts=True,
            routed_experts_start_len=start,
        )
        return replies

    def stream(self, prompts: Sequence[list[int]], output: int) -> None:
        async def one(prompt: list[int]) -> dict[str, Any]:
            last: dict[str, Any] = {}
            replies = await self.engine.async_generate(
                input_ids=prompt,
                sampling_params=_sampling(output),
                stream=True,
                return_routed_experts=True,
            )
            async for part in replies:
                last = part
            return last

        async def all_of_them() -> Outputs:
            return list(await asyncio.gather(*map(one, prompts)))

        for reply in self.engine.loop.run_until_complete(all_of_them()):
            self.take(reply, 0)

    def take(self, reply: dict[str, Any], start: int) -> None:
        meta = reply["meta_info"]
        self.requests += 1
        try:
            with ShmRouteReader(meta, timeout=20, allow_missing=self._allow_missing) as routes:
                wanted = meta["prompt_tokens"] + meta["completion_tokens"] - 1 - start
                if (routes.tokens, routes.start) != (wanted, start):
                    raise AssertionError(f"{routes}: expected {wanted} rows from {start} on")
                rows = routes.numpy()
                if len(rows) and int(rows.max()) >= routes.layout.num_experts:
                    raise AssertionError(f"{routes}: an expert id of {rows.max()}")
                self.rows += wanted
                self.inline += routes.inline
                routes.release()
        except RouteFailed:
            self.failed += 1


def _sampling(output: int) -> dict[str, Any]:
    return {"max_new_tokens": output, "temperature": 1.0, "ignore_eos": True}


def mixed(client: Client) -> None:
    """Prefix hits, two turns, chunked prefills, streams, 256 at once, retraction."""
    shared = [client.prompt(n) for n in (64, 150, 400, 901)]
    prompts = [
        shared[i % 4] + client.prompt(int(client.random.integers(1, 120))) for i in client.some(256)
    ]
    first = client.send(prompts, [int(n) for n in client.random.integers(1, 90, len(prompts))])
    turns = [prompts[i] + first[i]["output_ids"] + client.prompt(17) for i in client.some(96)]
    half = len(turns) // 2
    client.send(turns[:half], 24)
    client.send(turns[half:], 24, start=min(map(len, turns[half:])) - 10)
    client.send([client.prompt((3001, 2048, 2047, 1537)[i]) for i in client.some(4)], 8)
    client.stream([shared[i % 4] + client.prompt(30) for i in client.some(32)], 40)
    client.send([client.prompt(40) for _ in client.some(256)], 300)
    same = client.prompt(333)
    client.send([same for _ in client.some(24)], 12)


def reuse(client: Client) -> None:
    """Short requests through a pool of KV locations that holds a few of them."""
    for _ in range(6):
        client.send([client.prompt(24) for _ in client.some(120)], 9)


def bulk(client: Client) -> None:
    """Many tokens at full width: long prompts, a full batch, second turns, shared prefixes."""
    for _ in range(3):
        client.send([client.prompt(8000) for _ in client.some(16)], 16)
    replies = client.send([client.prompt(256) for _ in client.some(160)], 64)
    client.send([client.prompt(100) + reply["output_ids"] for reply in replies], 32)
    shared = client.prompt(7900)
    for _ in range(2):
        client.send([shared + client.prompt(200) for _ in client.some(34)], 16)
    client.stream([client.prompt(500) for _ in client.some(32)], 32)


def attention_ranks(client: Client) -> None:
    """The mix on ranks that share their MoE layers; then what transformers routes as well.

    For the native path takes a rank's rows out of all ranks' as ours does. All ranks are busy
    with different lengths, then one of them while the others only take part.
    """
    mixed(client)
    reference = ReferenceRoutes(client.model)
    client.compare(reference, [client.prompt(n) for n in range(20, 420, 10)], 40)
    for length in (1, 300, 33, 700):
        client.compare(reference, [client.prompt(length)], 30)
    client.compare(reference, [client.prompt(n) for n in (5, 600, 64)], 50)


def paused(client: Client) -> None:
    """The memory is given back and taken again, as a colocated trainer does."""
    mixed(client)
    for _ in range(2):
        before = gpu_used()
        client.engine.release_memory_occupation()
        between = gpu_used()
        client.engine.resume_memory_occupation()
        print(f"GPU memory: {before >> 20} MiB, released {between >> 20} MiB", flush=True)
        mixed(client)
