"""The records of a batch, opened one by one while those before are copied.

A batch's memory is taken before its first record is opened, for as many rows as the tickets speak
of; records named by rid, and those whose tickets speak of very many, are opened for that.

A source is a record or the records of one sequence, see ``sequences``.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator, Sequence
from typing import Any

from .errors import LayoutMismatch
from .opening import Opener, Record, SlotRecord
from .releasing import as_many, is_sequence
from .sequences import Joined, join
from .ticket import InlineRecord, SkimmedTicket, Ticket, skim_source

# Tokens that memory is taken for on a ticket's word. A record of more is opened first, which is
# nothing beside copying it.
_TOKENS_BELIEVED = 1 << 16


class Records:
    """The records of a batch, in order, each opened when it is needed and until ``close``.

    Parameters
    ----------
    sources
        Of ``read_batch``.
    arena, allow_missing
        See ``ShmRouteReader``.
    timeout
        Seconds to wait for records that are not there yet, all together.
    """

    def __init__(
        self, sources: Any, arena: str | None, timeout: float, allow_missing: bool
    ) -> None:
        self._deadline = time.monotonic() + timeout
        self._opener = Opener(arena, allow_missing=allow_missing)
        self._sources: list[SkimmedTicket | Ticket | InlineRecord | str] = []
        self._firsts: list[int] = []
        self._turns: list[int | None] = []
        self._opened: dict[int, Record] = {}
        self._known: dict[Any, int] = {}
        for source in as_many(sources):
            self._add(source)
        if not self._sources:
            raise ValueError("a batch of no sources: of what shape would it be?")

    def _add(self, source: Any) -> None:
        self._firsts.append(len(self._sources))
        if not is_sequence(source):
            self._turns.append(None)
            self._sources.append(skim_source(source))
            return
        if not source:
            raise ValueError(f"source {len(self._turns)} is a sequence of no records")
        self._turns.append(len(source))
        self._sources += map(skim_source, source)

    def __getitem__(self, index: int) -> Record:
        record = self._opened.get(index)
        if record is None:
            source = self._sources[index]
            if isinstance(source, SkimmedTicket):
                source = source.ticket()
            left = max(0.0, self._deadline - time.monotonic())
            record = self._opened[index] = self._opener.open(source, left)
            self._check(index, record)
        return record

    def sequences(self) -> Iterator[Joined]:
        """One of each source, as the tickets say. Each is compared with its record when that is
        opened; if it says a lot, it is opened here, as it is by ``rows``: before memory is taken.

        Raises
        ------
        ValueError
            See ``sequences.join``.
        """
        for number, (first, turns) in enumerate(zip(self._firsts, self._turns, strict=True)):
            last = first + (turns or 1)
            yield join(number, first, [self._bounds(index) for index in range(first, last)])

    def rows(self) -> int:
        """Of all records, where no source is a list of them."""
        return sum([self._bounds(index)[1] for index in range(len(self._sources))])

    @property
    def turns(self) -> Sequence[int | None]:
        """How many records each source is a list of; None: it is no list."""
        return self._turns

    @property
    def in_turns(self) -> bool:
        """Whether a source is a list of records."""
        return self._turns.count(None) < len(self._turns)

    def _bounds(self, index: int) -> tuple[int, int]:
        source: Any = self._sources[index]
        if isinstance(source, str) or source.start + source.tokens > _TOKENS_BELIEVED:
            source = self[index]
        return source.start, source.tokens

    def close(self) -> None:
        """Let go of every record."""
        self._opened.clear()
        self._opener.close()

    def _named(self, index: int) -> str:
        source = bisect.bisect_right(self._firsts, index) - 1
        turn = "" if self._turns[source] is None else f"[{index - self._firsts[source]}]"
        return f"{source}{turn}"

    def _check(self, index: int, record: Record) -> None:
        first = record if index == 0 else self[0]
        if record.routes is not first.routes and _geometry(record) != _geometry(first):
            raise LayoutMismatch(
                f"source {self._named(0)} (rid {first.rid!r}) has {_described(first)}, source "
                f"{self._named(index)} (rid {record.rid!r}) has {_described(record)}: read each "
                "model's records in a batch of their own"
            )
        other = self._known.setdefault(_identity(record), index)
        if other != index:
            raise ValueError(
                f"sources {self._named(min(other, index))} and {self._named(max(other, index))} "
                f"are the same record, of rid {record.rid!r}: read it once and index the result"
            )


def _geometry(record: Record) -> tuple[int, int, tuple[int, ...]]:
    # Not the model's name, which engines may take from different paths.
    return record.routes.num_experts, record.routes.top_k, record.routes.layer_ids


def _described(record: Record) -> str:
    experts, top_k, layer_ids = _geometry(record)
    return f"top-{top_k} of {experts} experts in {len(layer_ids)} layers {list(layer_ids)[:64]}"


def _identity(record: Record) -> Any:
    if isinstance(record, SlotRecord):
        return record.rows.address  # no other record has it while we hold this one
    return record.rid, record.start, record.tokens
