"""More than one scheduler: data and tensor parallelism.

Engine starts:

8   Qwen3-MoE of 32 experts, ``--dp-size 2``: two arenas of one name
9   the same model, ``--tp-size 2``: one arena
12  the same model, both with ``--enable-dp-attention``: two arenas, and MoE layers that run on the
    tokens of both ranks
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import Engines
from reference_routes import ReferenceRoutes
from traffic import EveryConfiguration, Reply, Routes, Traffic

from shmroute import ShmRouteReader
from shmroute.ticket import Ticket, decode

pytestmark = pytest.mark.engine

#: SGLang wants a NUMA node for each rank on a CPU unless told which processors to use.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def serve_thirty_two(traffic: Traffic) -> list[tuple[Reply, Routes]]:
    """Requests of different lengths at once, with a prefix that they share."""
    prefix = traffic.prompt(40)
    prompts = [prefix + traffic.prompt(10 + 3 * i) for i in range(32)]
    replies = traffic.together(
        [lambda prompt=prompt: traffic.generate(prompt) for prompt in prompts]
    )
    found = [(reply, traffic.routes(reply)) for reply in replies]
    for prompt, (_, routes) in zip(prompts, found, strict=True):
        assert len(routes.rows) == len(prompt) + 24 - 1
    return found


class TestDataParallel(EveryConfiguration):
    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, engines: Engines, checkpoint: Callable[[str], Path]) -> Iterator[Traffic]:
        model = checkpoint("qwen3-32")
        with engines.serve(
            "dp", model, "--dp-size=2", ending="terminate", env=TWO_RANKS
        ) as traffic:
            serve_thirty_two(traffic)
            yield traffic

    def test_each_rank_has_an_arena_under_the_one_name(self, served: Traffic) -> None:
        arenas = served.arenas()
        assert len(arenas) == 2
        assert len({arena.description.writer.pid for arena in arenas}) == 2

    def test_both_arenas_hold_records(self, served: Traffic) -> None:
        assert all(arena.counters["sealed"] > 0 for arena in served.arenas())

    def test_a_rid_is_found_whichever_rank_served_it(self, served: Traffic) -> None:
        replies = served.together(
            8 * [lambda: served.generate(served.prompt(30), max_new_tokens=8)]
        )
        segments = set()
        for reply in replies:
            ticket = decode(reply.ticket)
            assert isinstance(ticket, Ticket)
            segments.add(ticket.segment.base)
            with ShmRouteReader(reply.rid, arena=served.arena) as routes:
                found = decode(routes.ticket)
            assert isinstance(found, Ticket)
            assert (found.segment, found.slot) == (ticket.segment, ticket.slot)
        assert len(segments) == 2


class TestTensorParallel(EveryConfiguration):
    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, engines: Engines, checkpoint: Callable[[str], Path]) -> Iterator[Traffic]:
        model = checkpoint("qwen3-32")
        with engines.serve("tp", model, "--tp-size=2", ending="kill", env=TWO_RANKS) as traffic:
            serve_thirty_two(traffic)
            yield traffic

    def test_the_ranks_share_one_arena(self, served: Traffic) -> None:
        assert len(served.arenas()) == 1

    def test_a_request_is_counted_once_and_not_on_each_rank(self, served: Traffic) -> None:
        before = served.counters()
        served.routes(served.generate(served.prompt(30)))
        after = served.counters()
        assert after["finished"] == before["finished"] + 1
        assert after["reserved"] == before["reserved"] + 1


class TestAttentionDataParallel(EveryConfiguration):
    @pytest.fixture(scope="class")
    @classmethod
    def records(cls) -> list[tuple[Reply, Routes]]:
        """What was read while the engine lived."""
        return []

    @pytest.fixture(scope="class")
    @classmethod
    def served(
        cls,
        engines: Engines,
        checkpoint: Callable[[str], Path],
        records: list[tuple[Reply, Routes]],
    ) -> Iterator[Traffic]:
        model = checkpoint("qwen3-32")
        flags = "--tp-size=2", "--dp-size=2", "--enable-dp-attention"
        with engines.serve(
            "dp-attention", model, *flags, ending="terminate", env=TWO_RANKS
        ) as traffic:
            records += serve_thirty_two(traffic)
            # Each of these alone, while the other rank has nothing to do but take part.
            for length in (1, 50, 17, 90):
                reply = traffic.generate(traffic.prompt(length))
                records.append((reply, traffic.routes(reply)))
            yield traffic

    def test_each_rank_has_an_arena_under_the_one_name(self, served: Traffic) -> None:
        arenas = served.arenas()
        assert len(arenas) == 2
        assert len({arena.description.writer.pid for arena in arenas}) == 2

    def test_each_rank_counts_its_own_requests(self, served: Traffic) -> None:
        for arena in served.arenas():
            assert arena.counters["finished"] == arena.counters["ticketed"] >= 10
            assert arena.counters["shadow_rows"] == arena.counters["rows_sealed"] >= 500

    def test_transformers_routes_the_same_tokens_alike_whichever_rank_served_them(
        self,
        served: Traffic,
        records: list[tuple[Reply, Routes]],
        checkpoint: Callable[[str], Path],
    ) -> None:
        """The native path takes a rank's rows out of all ranks' as ours does: no reference here."""
        reference = ReferenceRoutes(checkpoint("qwen3-32"))
        ranks = set()
        for reply, routes in records:
            ticket = decode(reply.ticket)
            assert isinstance(ticket, Ticket)
            ranks.add(ticket.segment.base)
            # Of another token's rows every eighth choice would be the same.
            assert reference.agreement(reply.tokens[:-1], routes.rows) > 0.9
        assert len(ranks) == 2
