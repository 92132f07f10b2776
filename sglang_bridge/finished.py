"""Requests at their end, and the work that follows: what passes between the bridge's threads."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from shmroute.reservation import Reservation


class Finished:
    """A request whose KV cache is released next, and what will be gone then.

    It is taken between two statements of SGLang's, so its making is as little as that.
    ``describe`` reads the rest, in a loop over all requests of a step.

    Parameters
    ----------
    req
        SGLang's; None once it is answered.
    start, end
        Rows ``[start, end)`` of the request are wanted.
    locations
        Its KV locations, as the gatherer's ``snapshot`` took them: a copy, since
        ``req_to_token`` changes right after.
    native
        In shadow mode SGLang's own rows, ``int32 [tokens, all layers, top_k]``.

    Attributes
    ----------
    tokens
        How many rows that is.
    rid, prompt_tokens
        Once it is described.
    """

    __slots__ = (
        "_output",
        "_prompt",
        "locations",
        "native",
        "prompt_tokens",
        "req",
        "rid",
        "start",
        "tokens",
    )

    def __init__(
        self, req: Any, start: int, end: int, locations: Any, native: torch.Tensor | None
    ) -> None:
        self.req = req
        self.start = start
        self.tokens = end - start
        self.locations = locations
        self.native = native

    def describe(self) -> None:
        """Read what its record needs."""
        req = self.req
        prompt = req.origin_input_ids
        if req.session is not None:
            prompt = prompt[:]  # the session's next turn takes the array over and changes it
        self._prompt, self._output = prompt, req.output_ids
        self.prompt_tokens = len(prompt)
        self.rid = str(req.rid)

    def answer(self, carried: Any) -> None:
        """Give the response what it carries, and let go of SGLang's request.

        Its record may be on its way for long, and images of the request's on a GPU are not kept
        for that.
        """
        self.req.routed_experts = carried
        self.req = None

    def token_ids(self) -> npt.NDArray[np.int64]:
        """Ids of the tokens that have rows; called on another thread.

        Slices copy under the interpreter lock, and no buffer of a list that the scheduler may
        still append to is held open.
        """
        end = self.start + self.tokens
        ids = _as_array(self._prompt[self.start : end])
        rest = end - self.prompt_tokens
        if rest <= 0:
            return ids
        first = max(0, self.start - self.prompt_tokens)
        return np.concatenate((ids, _as_array(self._output[first:rest])))


def _as_array(ids: Any) -> npt.NDArray[np.int64]:
    """A slice of token ids. Of an ``array`` it shares the memory: element by element a long
    one would take the interpreter from the scheduler for a third of a millisecond."""
    if isinstance(ids, array) and ids.typecode == "q":
        return np.frombuffer(ids, dtype=np.int64)
    return np.array(ids, dtype=np.int64)


@dataclass(slots=True)
class Job:
    """A finished request with a place in the arena.

    Attributes
    ----------
    epoch
        The weight epoch when it finished.
    tags
        ``int64 [tokens]`` beside its rows, once both are in memory.
    error
        Why they never will be.
    """

    request: Finished
    record: Reservation
    epoch: int
    tags: npt.NDArray[np.int64] | None = None
    error: Exception | None = None


class Gathered(Protocol):
    """Jobs whose rows are on their way into the arena."""

    jobs: list[Job]

    def wait(self) -> None:
        """Return when each job has its rows in the arena and its tags, or its error."""

    def done(self) -> None:
        """The tags are no longer needed."""


class Gatherer(Protocol):
    """Moves rows out of the route table into the arena; one form for a CPU, one for CUDA."""

    @property
    def idle(self) -> bool:
        """Whether the result of every forward that has begun is processed. Any thread."""

    def start(self, hand_over: Callable[[Gathered | None], None]) -> None:
        """Begin; ``hand_over`` is called with what is gathered, in order, and None at the end."""

    def forward_begins(self, waits: bool = False) -> int:
        """On the forward's stream, before the model runs; returns the forward's number.

        ``waits``: its scatter may be inside it, so all of it comes after the gathers that were
        submitted.
        """

    def result_processed(self, forward: int | None) -> None:
        """The scheduler thread has waited for this forward's end; its requests end next.

        None: a forward whose beginning was not seen.
        """

    def look_at(self, req_to_token: torch.Tensor) -> None:
        """At the start: the pool that ``snapshot`` will be asked for."""

    def snapshot(self, req_to_token: torch.Tensor, slot: int, start: int, end: int) -> Any:
        """Copy a request's KV locations, ordered before any later write of ``req_to_token``.

        Returns what the gatherer makes of it; valid until the next step's result.
        """

    def has_room(self, nbytes: int) -> bool:
        """Whether rows of this size may be submitted, beside what is under way."""

    def submit(self, jobs: list[Job]) -> None:
        """Gather what finished in one step; does not wait. Scheduler thread."""

    def gather_now(self, request: Finished) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Rows ``[tokens, moe_layers, top_k]`` and tags of one request, at once: this waits."""

    def fence(self) -> None:
        """Let the next scatter come after every gather that was submitted."""

    def give_back(self) -> None:
        """Free device memory while a colocated trainer needs it; the engine is idle."""

    def take_again(self) -> None:
        """Take it again; the table's rows are invalid until forwards fill them."""

    def stop(self) -> None:
        """Finish what was submitted and end."""
