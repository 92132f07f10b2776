"""Which tokens of a packed batch one rank of a trainer computes.

Problem
    Under context parallelism and sequence parallelism a rank computes some tokens of the batch,
    and its routers see no others. Routes for other tokens than those are no error to a router:
    the shapes agree, and every token is sent to experts of another.

The cut
    1 pad each sequence: to a multiple of ``sequence_multiple`` and, for zigzag, of 2 cp_size;
      with ``pad_last_sequence`` the last one further, until the batch comes out even
    2 context parallelism::

          zigzag      each sequence is cut into 2 cp_size chunks of one length, rank r computes
                      chunks r and 2 cp_size - 1 - r: with causal attention that is equal work

                      cp_size 2:  | 0 | 1 | 2 | 3 |    rank 0: 0 3    rank 1: 1 2

          contiguous  the packed batch is cut into cp_size pieces of one length, wherever that
                      is in a sequence
    3 pad the rank's rows to a multiple of ``batch_multiple`` and of ``sp_size``; contiguous, the
      whole batch, so that each rank's are
    4 sequence parallelism: rank r computes the r-th of sp_size pieces of those rows

Each token of each sequence is computed by exactly one rank.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens ``[first, end)`` of a sequence, in a rank's rows from ``to`` on.

    Tokens from the sequence's length on are its padding.
    """

    to: int
    sequence: int
    first: int
    end: int


class Cut(NamedTuple):
    """What one rank computes.

    Attributes
    ----------
    rows
        How many there are on this rank, padding included; the same on each rank.
    pieces
        What lies in them, from row 0 on and in order. Behind the last is padding.
    """

    rows: int
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """The share of a packed batch that one rank computes.

    Parameters
    ----------
    cp_rank, cp_size
        Context-parallel rank and number of ranks (also those of Ulysses).
    zigzag
        Cut each sequence into ``2 * cp_size`` chunks, of which a rank takes one from the front
        and its mirror from the back. False: cut the packed batch into ``cp_size`` pieces.
    sp_rank, sp_size
        Rank and number of ranks of sequence parallelism, which are those of tensor parallelism.
        Without sequence parallelism every tensor-parallel rank computes all tokens: leave them.
    sequence_multiple
        Each sequence is padded to a multiple of this many tokens, besides what zigzag needs.
        A multiple that no sequence exceeds pads all to that length.
    batch_multiple
        The rows of a context-parallel rank are padded to a multiple of this.
    pad_last_sequence
        That padding belongs to the last sequence and is cut with it, rather than to lie behind
        each rank's rows.

    Raises
    ------
    ValueError
        A rank that is none of its size, a multiple below 1, or one that is no integer.

    Notes
    -----
    How trainers cut, with TP and CP for their sizes, and ``sp_size=TP`` under sequence parallelism:

    slime, miles
        zigzag, ``batch_multiple=128 * TP`` (128 is their ``data_pad_size_multiplier``); with
        ``allgather_cp`` contiguous.
    Megatron-core, Transformer Engine (THD)
        zigzag, and the multiples that the data loader pads to.
    verl, Megatron backend
        zigzag, ``sequence_multiple=TP * CP * 2`` (TP where CP is 1). With FP8, of that number m:
        ``sequence_multiple=lcm(16, m), batch_multiple=128 * m // CP, pad_last_sequence=True``.
    verl, FSDP backend with Ulysses
        contiguous, ``cp_size`` its number of ranks.
    padded batches ``[sequences, length]``
        ``sequence_multiple=length``; the rows are ``[sequences * length / CP]``.

    Examples
    --------
    >>> Partition(cp_rank=1, cp_size=2).cut([8, 5])
    Cut(rows=8, pieces=(Piece(to=0, sequence=0, first=2, end=6), Piece(to=4, sequence=1, first=2, \
end=6)))
    """

    cp_rank: int = 0
    cp_size: int = 1
    zigzag: bool = True
    sp_rank: int = 0
    sp_size: int = 1
    sequence_multiple: int = 1
    batch_multiple: int = 1
    pad_last_sequence: bool = False

    def __post_init__(self) -> None:
        for name in ("cp_size", "sp_size", "sequence_multiple", "batch_multiple"):
            if self._integer(name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for kind in ("cp", "sp"):
            rank, size = self._integer(f"{kind}_rank"), getattr(self, f"{kind}_size")
            if not 0 <= rank < size:
                raise ValueError(
                    f"{kind}_rank is {rank} with a {kind}_size of {size}: ranks are 0 to {size - 1}"
                )

    def _integer(self, name: str) -> int:
        value = getattr(self, name)
        try:
            return operator.index(value)
        except TypeError as error:
            raise ValueError(f"{name} is {value!r}: it must be an integer") from error

    def cut(self, lengths: Sequence[int]) -> Cut:
        """What this rank computes of a batch.

        Parameters
        ----------
        lengths
            Tokens of each sequence, without padding.
        """
        padded = self._padded(lengths)
        even = math.lcm(self.batch_multiple, self.sp_size)
        if self._mirrored:
            rows = _to_multiple(sum(padded) // self.cp_size, even)
            stream, first = _joined(self._two_chunks(padded)), 0
        else:
            rows = _to_multiple(sum(padded), self.cp_size * even) // self.cp_size
            stream, first = _joined(_whole(padded)), self.cp_rank * rows
        share = rows // self.sp_size
        first += self.sp_rank * share
        return Cut(share, tuple(_window(stream, first, first + share)))

    @property
    def _mirrored(self) -> bool:
        return self.zigzag and self.cp_size > 1

    def _padded(self, lengths: Sequence[int]) -> list[int]:
        multiple = self.sequence_multiple
        if self._mirrored:
            multiple = math.lcm(multiple, 2 * self.cp_size)
        padded = [_to_multiple(length, multiple) for length in lengths]
        if self.pad_last_sequence and padded:
            even = math.lcm(multiple, self.cp_size * math.lcm(self.batch_multiple, self.sp_size))
            padded[-1] += -sum(padded) % even
        return padded

    def _two_chunks(self, padded: Iterable[int]) -> Iterable[tuple[int, int, int]]:
        """Sequence, first and end of a context-parallel rank's chunks, neighbours joined."""
        for sequence, length in enumerate(padded):
            chunk = length // (2 * self.cp_size)
            front = self.cp_rank * chunk
            back = length - front - chunk
            if front + chunk == back:
                yield sequence, front, back + chunk
            else:
                yield sequence, front, front + chunk
                yield sequence, back, back + chunk


def _whole(lengths: Iterable[int]) -> Iterable[tuple[int, int, int]]:
    """Sequence, first and end of all there is."""
    return ((sequence, 0, length) for sequence, length in enumerate(lengths))


def _joined(chunks: Iterable[tuple[int, int, int]]) -> Iterable[Piece]:
    """The chunks one behind the other."""
    to = 0
    for sequence, first, end in chunks:
        yield Piece(to, sequence, first, end)
        to += end - first


def _window(pieces: Iterable[Piece], first: int, end: int) -> Iterable[Piece]:
    """What lies within rows ``[first, end)``, counted from there."""
    for piece in pieces:
        skipped = max(0, first - piece.to)
        length = min(piece.end - piece.first, end - piece.to)
        if skipped < length:
            yield Piece(
                piece.to + skipped - first,
                piece.sequence,
                piece.first + skipped,
                piece.first + length,
            )


def _to_multiple(count: int, multiple: int) -> int:
    return count + -count % multiple
