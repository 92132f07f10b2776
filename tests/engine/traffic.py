"""Requests to a real engine, and their routes, read by rid in this process.

This process shares nothing with the engine but the arena's name. Every record that is read
is checked for what holds of any record (shape, dtype, range of the ids, no expert twice)
and counted, so that a configuration can say over how many rows and experts it speaks.
Whether the ids are those that the model used is what the engine's shadow mode compares,
and ``counters`` tells.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
from small_models import SPECIAL_TOKENS, ModelShape

import shmroute
from shmroute import ShmRouteReader, WeightRun, inspection

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """A response of ``/generate``; ``prompt`` is empty when a text was sent."""

    prompt: list[int]
    body: dict[str, Any]

    @property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = self.body["meta_info"]
        return meta

    @property
    def rid(self) -> str:
        return str(self.meta["id"])

    @property
    def ticket(self) -> bytes:
        return base64.b64decode(self.meta["routed_experts"])

    @property
    def output(self) -> list[int]:
        return list(self.body["output_ids"])

    @property
    def tokens(self) -> list[int]:
        """Prompt and output, the last sampled token included."""
        return self.prompt + self.output

    @property
    def forwarded(self) -> int:
        """Tokens that went through the model: all but the last one sampled."""
        return int(self.meta["prompt_tokens"]) + int(self.meta["completion_tokens"]) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """A record, copied out of the arena. ``rows``: ``[tokens, moe_layers, top_k]``."""

    rows: npt.NDArray[Any]
    start: int
    prompt_tokens: int
    layer_ids: tuple[int, ...]
    weight_versions: tuple[WeightRun, ...]
    native: npt.NDArray[np.int32]


class Traffic:
    """A client of one engine and a reader of its arena.

    Parameters
    ----------
    url
        Of the server; empty for an engine without HTTP.
    arena
        Name of its arena; empty for an engine without one.
    log
        Returns all output of the engine up to now.
    """

    def __init__(self, url: str, arena: str, shape: ModelShape, log: Callable[[], str]) -> None:
        self.arena = arena
        self.shape = shape
        self.log = log
        self.rows_read = 0
        self.used = np.zeros((len(shape.layer_ids), shape.num_experts), dtype=bool)
        self._random = np.random.default_rng(0)
        ordinary = np.arange(len(SPECIAL_TOKENS), shape.vocab_size)
        self._first_tokens = iter(self._random.permutation(ordinary).tolist())
        self._tickets: list[str | bytes] = []
        self._final: dict[str, int] | None = None
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=300.0)

    def __enter__(self) -> Traffic:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    # -- requests ----------------------------------------------------------------------------

    def prompt(self, tokens: int) -> list[int]:
        """Random token ids, none of them special; no two prompts begin with the same one."""
        rest = self._random.integers(len(SPECIAL_TOKENS), self.shape.vocab_size, tokens - 1)
        return [next(self._first_tokens), *rest.tolist()]

    def post(self, path: str, body: dict[str, Any], expect: int = 200) -> httpx.Response:
        """POST a body as JSON; another status than ``expect`` is an error."""
        response = self._http.post(path, json=body)
        assert response.status_code == expect, f"{response.status_code}: {response.text}"
        if expect == 200 and response.content.startswith((b"{", b"[")):
            self._keep_tickets(response.json())
        return response

    def generate(
        self, prompt: Sequence[int], *, routes: bool = True, start: int = 0, **sampling: Any
    ) -> Reply:
        """One request to ``/generate``; it ends after ``max_new_tokens``, by default 24."""
        body = native_request(prompt, routes=routes, start=start, **sampling)
        return Reply(list(prompt), self.post("/generate", body).json())

    def together(self, calls: Iterable[Callable[[], T]]) -> list[T]:
        """Make all of the calls at once; results in their order."""
        waiting = list(calls)
        with ThreadPoolExecutor(len(waiting)) as pool:
            return [future.result() for future in [pool.submit(call) for call in waiting]]

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The chunks of a streamed answer, as they come; leaving disconnects."""
        with self._http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200
            yield self._chunks(response)

    def _chunks(self, response: httpx.Response) -> Iterator[dict[str, Any]]:
        for line in _lines(response):
            data = line.strip().removeprefix(b"data: ")
            if data and data != b"[DONE]":
                chunk: dict[str, Any] = json.loads(data)
                self._keep_tickets(chunk)
                yield chunk

    # -- routes ------------------------------------------------------------------------------

    def routes(self, reply: Reply) -> Routes:
        """Read by rid; the record must have a row for every token that was forwarded."""
        found = self.read(reply.rid)
        assert found.start + len(found.rows) == reply.forwarded
        assert found.prompt_tokens == reply.meta["prompt_tokens"]
        return found

    def read(self, source: Any) -> Routes:
        """Read a record by rid, ticket or response, and check what holds of every record."""
        with ShmRouteReader(source, arena=self.arena, timeout=30.0) as routes:
            assert not routes.inline
            rows = routes.numpy().copy()
            found = Routes(
                rows,
                routes.start,
                routes.prompt_tokens,
                routes.layer_ids,
                routes.weight_versions,
                routes.native(),
            )
            self._tickets.append(routes.ticket)
        shape = self.shape
        assert found.layer_ids == shape.layer_ids
        assert rows.shape[1:] == (len(shape.layer_ids), shape.top_k)
        assert rows.dtype == (np.uint8 if shape.num_experts <= 256 else np.uint16)
        assert rows.max() < shape.num_experts
        ordered = np.sort(rows, axis=-1)
        assert (ordered[..., 1:] != ordered[..., :-1]).all(), "an expert chosen twice"
        self.rows_read += len(rows)
        for layer in range(rows.shape[1]):
            self.used[layer, rows[:, layer]] = True
        return found

    def _keep_tickets(self, body: Any) -> None:
        """Remember the tickets in a response: those that nobody reads are released, too."""
        if isinstance(body, list):
            for part in body:
                self._keep_tickets(part)
        elif isinstance(body, dict):
            ticket = body.get("routed_experts")
            if ticket and self.arena:
                self._tickets.append(ticket)
            for part in body.values():
                self._keep_tickets(part)

    def finish(self) -> None:
        """Keep the engine's last counters and release the record of every ticket seen."""
        if self.arena:
            self._final = self.counters()
            shmroute.release(self._tickets)

    # -- the engine's own figures ------------------------------------------------------------

    def arenas(self) -> list[inspection.ArenaReport]:
        """Reports of the arenas of this engine, one a data-parallel rank."""
        reports = inspection.inspect_all(self.arena)
        return [report for report in reports if report.state == inspection.LIVE]

    def counters(self) -> dict[str, int]:
        """The counters of all its arenas, added, once nothing is on its way to be sealed.

        After ``finish`` the last ones.
        """
        if self._final is not None:
            return self._final
        deadline = time.monotonic() + 30.0
        while True:
            totals: dict[str, int] = {}
            for report in self.arenas():
                for name, value in report.counters.items():
                    totals[name] = totals.get(name, 0) + value
            if totals["reserved"] == totals["sealed"] + totals["failed"]:
                return totals
            assert time.monotonic() < deadline, f"records stay unsealed: {totals}"
            time.sleep(0.02)


def native_request(
    prompt: Sequence[int] | str,
    *,
    routes: bool = True,
    start: int = 0,
    rid: str | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """A body for ``/generate``: sampled at temperature 1 unless told otherwise."""
    body: dict[str, Any] = {"text" if isinstance(prompt, str) else "input_ids": prompt}
    body["sampling_params"] = {
        "max_new_tokens": 24,
        "temperature": 1.0,
        "ignore_eos": True,
        **sampling,
    }
    if routes:
        body["return_routed_experts"] = True
    if start:
        body["routed_experts_start_len"] = start
    if rid is not None:
        body["rid"] = rid
    return body


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Between line feeds only: a text may have other characters that end a line, unescaped."""
    rest = b""
    for part in response.iter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    yield rest


class EveryConfiguration:
    """What must hold for whatever an engine served; ``served`` is its traffic, all done."""

    def test_over_2000_rows_were_read_by_rid_in_another_process(self, served: Traffic) -> None:
        assert served.rows_read >= 2000

    def test_nine_tenths_of_the_experts_occur_in_every_layer(self, served: Traffic) -> None:
        assert served.used.mean(axis=1).min() >= 0.9

    def test_every_row_equals_the_native_path_bit_for_bit(self, served: Traffic) -> None:
        counters = served.counters()
        assert counters["shadow_rows"] == counters["rows_sealed"] >= 2000
        assert counters["shadow_mismatches"] == 0
        assert counters["shadow_rows_incomparable"] == 0
        assert "SHADOW MISMATCH" not in served.log()

    def test_every_row_is_there_and_tagged_with_its_token(self, served: Traffic) -> None:
        counters = served.counters()
        assert counters["tags_checked"] == counters["rows_sealed"]
        assert counters["tags_wrong"] == counters["rows_missing"] == counters["incomplete"] == 0

    def test_no_hook_and_no_record_failed(self, served: Traffic) -> None:
        counters = served.counters()
        assert counters["hook_errors"] == counters["failed"] == counters["failed_requests"] == 0
        assert counters["inline_full"] == counters["inline_after_failure"] == 0

    def test_every_finished_request_is_accounted_for(self, served: Traffic) -> None:
        counters = served.counters()
        kinds = ("ticketed", "inline", "failed_requests", "no_routes")
        assert counters["finished"] == sum(counters[kind] for kind in kinds) > 0
