"""One record between ``reserve`` and ``seal`` or ``fail``: what a producer fills in.

``writer`` has the protocol behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from . import layout
from .errors import ShmRouteError
from .metadata import Metadata, WeightRun, as_runs, merge_ranges

if TYPE_CHECKING:
    from .writer import RecordWriter


class Wanted(Protocol):
    """A record to reserve: see ``RecordWriter.reserve``."""

    rid: str
    tokens: int
    start: int
    prompt_tokens: int


class Reservation:
    """One record between ``reserve`` and ``seal`` or ``fail``.

    As a context manager it seals on leaving, and fails when an exception passes.

    Attributes
    ----------
    rows
        Writable ``[tokens, moe_layers, top_k]`` array over the record's extent. NumPy casts
        what is assigned without a word: ids must be within ``[0, num_experts)``.
    ticket
        The envelope (bytes) that lets a reader find the record; valid at once.
    open
        Neither sealed nor failed yet.
    """

    __slots__ = (
        "_writer",
        "complete",
        "generation",
        "offset",
        "open",
        "plan",
        "prompt_tokens",
        "rid",
        "slot",
        "start",
        "tokens",
    )

    def __init__(
        self,
        writer: RecordWriter,
        slot: int,
        generation: int,
        rid: str,
        start: int,
        tokens: int,
        prompt_tokens: int,
        plan: layout.ExtentPlan,
        offset: int,
    ) -> None:
        self.slot = slot
        self.generation = generation
        self.rid = rid
        self.start = start
        self.tokens = tokens
        self.prompt_tokens = prompt_tokens
        self.offset = offset
        self.plan = plan
        self.complete: bool | None = None
        self._writer = writer
        self.open = True

    @property
    def rows(self) -> npt.NDArray[Any]:
        memory = self._writer.memory
        routes = memory.description.routes
        return memory.array(self.offset, (self.tokens, *routes.row_shape), routes.dtype)

    @property
    def ticket(self) -> bytes:
        return self._writer.tickets.encode(
            self.slot, self.generation, self.rid, self.start, self.tokens, self.complete
        )

    def seal(
        self,
        *,
        missing: Iterable[tuple[int, int]] = (),
        versions: Iterable[WeightRun | tuple[int, int, str]] = (),
    ) -> None:
        """Hand the record to its readers. Every row must be in memory by now.

        Parameters
        ----------
        missing
            ``[first, end)`` ranges of rows that must not be used.
        versions
            Runs ``(first row, epoch, label)`` of weight versions, in row order.

        Raises
        ------
        ValueError
            Missing rows or weight runs that the record does not have; it stays open.
        ShmRouteError
            Already sealed or failed; or the arena was closed; or the metadata outgrew its
            room (the record then is failed, and its readers are told so).
        """
        metadata = Metadata(self.rid, merge_ranges(missing), as_runs(versions))
        metadata.check(self.tokens)  # before the end: a caller's mistake can still be failed
        self._end()
        self._writer.seal(self, metadata)

    def fail(self, reason: str) -> None:
        """Give the record up; whoever holds its ticket gets ``RouteFailed`` with ``reason``."""
        self._end()
        self._writer.fail(self, reason)

    def _end(self) -> None:
        if not self.open:
            raise ShmRouteError(f"the record of rid {self.rid!r} is sealed or failed already")
        self.open = False

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.open:
            return
        if error is None:
            self.seal()
        else:
            self.fail(f"aborted by {type(error).__name__}: {error}")
