"""One sequence of tokens out of one record or several, and where its rows go in a batch.

Problem
    An engine that is asked for ``routed_experts_start_len`` returns a turn's rows only: those
    from that token on. The turns of a conversation together are the rows that one request for
    all of its tokens would give, if they follow each other.

Promises
    - No row is made up: where turns leave a gap that is an error with its tokens.
    - Of two turns that both have a token's row, the later one's counts: its request had the
      whole conversation before it, as the trainer has it. So a turn that ends before the one
      before it did (the conversation was taken back) is where the sequence ends.

A record of ``tokens`` rows from ``start`` on is of a sequence of ``start + tokens + 1`` tokens: the
last one was sampled and never forwarded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .partition import Cut, Piece
from .selection import Run


class Turn(NamedTuple):
    """A record's share of its sequence.

    Attributes
    ----------
    record
        Its number among all records of the batch.
    start
        The token that its row 0 belongs to.
    first, end
        The tokens of the sequence whose rows it gives.
    """

    record: int
    start: int
    first: int
    end: int


class Joined(NamedTuple):
    """Rows of tokens ``[start, end)`` of a sequence of ``end + 1`` tokens."""

    turns: tuple[Turn, ...]

    @property
    def start(self) -> int:
        return self.turns[0].start

    @property
    def end(self) -> int:
        return self.turns[-1].end


def join(source: int, first_record: int, bounds: Sequence[tuple[int, int]]) -> Joined:
    """Join the records of a source, in the order of its turns.

    Parameters
    ----------
    source, first_record
        Number of the source, and of its first record among all records of the batch.
    bounds
        ``(start, tokens)`` of each record.

    Raises
    ------
    ValueError
        The turns are not in order, or rows between two of them are in neither.
    """
    if len(bounds) == 1:  # most are
        ((start, tokens),) = bounds
        return Joined((Turn(first_record, start, start, start + tokens),))
    for turn, ((start, tokens), (later, _)) in enumerate(itertools.pairwise(bounds)):
        if later < start:
            raise ValueError(
                f"source {source}: turn {turn + 1} has rows from token {later} on, turn {turn} "
                f"before it from {start} on: give a sequence's records in the order of their start"
            )
        end = start + tokens
        if end < later:
            raise ValueError(
                f"source {source}: turn {turn} has rows of tokens [{start}, {end}), turn "
                f"{turn + 1} from {later} on, so tokens [{end}, {later}) have none: a turn's last "
                "token has its row in the next one, which is to be asked for with "
                f"routed_experts_start_len={end} or less"
            )
    ends = [*(start for start, _ in bounds[1:]), sum(bounds[-1])]
    return Joined(
        tuple(
            [
                Turn(first_record + turn, start, start, end)
                for turn, ((start, _), end) in enumerate(zip(bounds, ends, strict=True))
            ]
        )
    )


class Whole:
    """All rows that there are, one sequence's behind the other's; no token without one.

    Parameters
    ----------
    rows
        Of all sequences.
    sequences
        Each is taken when its records are to be opened, and joined then: the copy of those
        before is under way by that time.

    Attributes
    ----------
    joined
        The sequences that were taken.
    """

    def __init__(self, rows: int, sequences: Iterable[Joined]) -> None:
        self.rows = rows
        self.joined: list[Joined] = []
        self._sequences = sequences

    def places(self) -> Iterator[tuple[int, Sequence[Run]]]:
        """Each record in turn, and which of its rows go where in the batch; maybe none do."""
        to = 0
        for sequence in self._sequences:
            self.joined.append(sequence)
            start = sequence.start
            for record, zero, first, end in sequence.turns:
                run = Run(to + first - start, first - zero, end - zero)
                yield record, (run,) if first < end else ()
            to += sequence.end - start

    def cumulative(self) -> list[int]:
        """Where each sequence's rows end, with a zero before the first."""
        lengths = [sequence.end - sequence.start for sequence in self.joined]
        return list(itertools.accumulate(lengths, initial=0))


class Share:
    """What one rank computes of the sequences, see ``partition``."""

    def __init__(self, joined: Sequence[Joined], cut: Cut) -> None:
        self.rows = cut.rows
        self.joined = joined
        self._pieces: list[list[Piece]] = [[] for _ in joined]
        for piece in cut.pieces:
            self._pieces[piece.sequence].append(piece)

    def places(self) -> Iterator[tuple[int, Sequence[Run]]]:
        """See ``Whole.places``."""
        for sequence, computed in zip(self.joined, self._pieces, strict=True):
            for turn in sequence.turns:
                yield turn.record, list(_runs(turn, computed))

    def cumulative(self) -> list[int]:
        """See ``Whole.cumulative``; one that has no row here ends as the one before."""
        ends = [0]
        for pieces in self._pieces:
            ends.append(max([ends[-1], *(piece.to + piece.end - piece.first for piece in pieces)]))
        return ends


def _runs(turn: Turn, pieces: Sequence[Piece]) -> Iterator[Run]:
    """Rows of a turn that lie in these pieces of its sequence."""
    for piece in pieces:
        first, end = max(turn.first, piece.first), min(turn.end, piece.end)
        if first < end:
            yield Run(piece.to + first - piece.first, first - turn.start, end - turn.start)
