"""What the scheduler thread spends in route collection, timed inside the scheduler process.

Problem: a client sees steps, not what they are made of, and an engine's end is SIGKILL, so the
scheduler can report nothing at its end.

Approach: a server started by ``engine_server.py`` has `run_scheduler` for its scheduler process,
which first wraps the functions in question (`_install`) and then runs SGLang's own entry point.
Each call becomes one row of a memory-mapped file; the clock, CLOCK_MONOTONIC, is the same in every
process. A row costs about 1.5 us, so traced runs are for these figures and the others for
throughput.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

ROWS = 500_000
EVENT = np.dtype([("at", "f8"), ("seconds", "f8"), ("size", "f8"), ("kind", "i4")])
FILE_VARIABLE = "SHMROUTE_BENCH_TRACE"

#: Kinds of rows. DECODE has the batch size, PREFILL minus it, FORWARD_* the batch size of a
#: decode or 0, COLLECT the request's tokens, SEND the bytes of routes in the message.
KINDS = (
    "count", "decode", "prefill", "forward_begin", "forward_end", "collect", "issue", "flush",
    "finalize", "send", "pinned_bytes", "gpu_bytes",
)  # fmt: skip

Events: TypeAlias = npt.NDArray[Any]
Size: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], float]


def create(path: Path) -> Events:
    """Make the file; row 0 holds the number of rows after it."""
    return np.memmap(path, EVENT, "w+", shape=(ROWS,))


def opened(path: Path) -> Events:
    """A file that was made, while a scheduler writes into it."""
    return np.memmap(path, EVENT, "r", shape=(ROWS,))


def rows_of(file: Events, first: int = 0) -> Events:
    """Rows written so far, from number ``first`` on."""
    return np.array(file[1 + first : 1 + int(file["size"][0])])


def of_kind(events: Events, kind: str) -> Events:
    return events[events["kind"] == KINDS.index(kind)]


def run_scheduler(*arguments: Any, **options: Any) -> Any:
    """Entry point of a traced scheduler process."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    try:
        _install(Recorder(Path(os.environ[FILE_VARIABLE])))
    except Exception as error:
        # A run without its trace is worth more than none; the figures say what is missing.
        print(f"no trace: {type(error).__name__}: {error}", flush=True)
    return run_scheduler_process(*arguments, **options)


class Recorder:
    """Writes rows; used by the scheduler thread only."""

    def __init__(self, path: Path) -> None:
        self._file = np.memmap(path, EVENT, "r+", shape=(ROWS,))
        self._count = 0

    def add(self, kind: int, at: float, seconds: float, size: float) -> None:
        if self._count + 1 >= ROWS:
            return
        self._count += 1
        self._file[self._count] = (at, seconds, size, kind)
        self._file["size"][0] = self._count

    def wrap(self, owner: Any, name: str, kind: str, size: Size) -> None:
        """Time every call of ``owner.name``."""
        function, number, clock = getattr(owner, name), KINDS.index(kind), time.perf_counter

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = clock()
            result = function(*arguments, **options)
            self.add(number, began, clock() - began, size(arguments, options))
            return result

        setattr(owner, name, timed)


def _install(recorder: Recorder) -> None:
    from sglang.srt.managers.scheduler_components.batch_result_processor import (
        SchedulerBatchResultProcessor as Processor,
    )
    from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
    from sglang.srt.state_capturer.base import BaseTopkCapturer, TopkCaptureOutput

    wrap = recorder.wrap
    wrap(Processor, "process_batch_result_decode", "decode", _batch_size)
    wrap(Processor, "process_batch_result_prefill", "prefill", _with_memory(recorder))
    wrap(SenderWrapper, "send_output", "send", _route_bytes)
    if os.environ.get("SHMROUTE_ARENA"):
        from sglang_bridge import collect
        from sglang_bridge.capturer import ArenaCapturer

        wrap(ArenaCapturer, "on_forward_begin", "forward_begin", _decoding)
        wrap(ArenaCapturer, "on_forward_end", "forward_end", _decoding)
        wrap(collect, "collect", "collect", _request_tokens)
        wrap(collect, "issue", "issue", lambda *_: 0.0)
        wrap(collect, "flush", "flush", lambda *_: 0.0)
    else:
        wrap(BaseTopkCapturer, "on_forward_end", "forward_end", _decoding)
        wrap(TopkCaptureOutput, "finalize", "finalize", lambda *_: 0.0)
        wrap(Processor, "_maybe_collect_routed_experts", "collect", _request_tokens)


def _argument(arguments: tuple[Any, ...], options: dict[str, Any], at: int, name: str) -> Any:
    return arguments[at] if len(arguments) > at else options[name]


def _batch_size(arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
    return float(len(_argument(arguments, options, 1, "batch").reqs))


def _decoding(arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
    batch = _argument(arguments, options, 1, "forward_batch")
    return float(batch.batch_size) if batch.forward_mode.is_decode() else 0.0


def _request_tokens(arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
    request = _argument(arguments, options, 1, "req")
    if not request.return_routed_experts:
        return 0.0
    return float(len(request.origin_input_ids) + len(request.output_ids))


def _route_bytes(arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
    routes = getattr(_argument(arguments, options, 1, "output"), "routed_experts", None) or ()
    return float(sum(one.nbytes for one in routes if hasattr(one, "nbytes")))


def _with_memory(recorder: Recorder) -> Size:
    """Note page-locked and GPU memory with every prefill: seldom, and outside decode steps."""
    import torch

    def size(arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
        if torch.cuda.is_available():
            now, host = time.perf_counter(), torch.cuda.host_memory_stats()
            pinned = float(host.get("allocated_bytes.current", 0))
            recorder.add(KINDS.index("pinned_bytes"), now, 0.0, pinned)
            allocated = float(torch.cuda.memory_allocated())
            recorder.add(KINDS.index("gpu_bytes"), now, 0.0, allocated)
        return -_batch_size(arguments, options)

    return size


# -- what the rows say ---------------------------------------------------------------------------


class Step(NamedTuple):
    """A decode step in which requests that asked for routes finished.

    Attributes
    ----------
    collects
        The calls at their ends.
    issuing, flushing
        Seconds spent on the tickets of all of them, and on handing them over.
    sending
        Seconds that the message with their responses took.
    """

    collects: Events
    issuing: float
    flushing: float
    sending: float

    @property
    def ticketing(self) -> float:
        """Seconds until every request of the step has what its response carries."""
        return float(self.collects["seconds"].sum()) + self.issuing


def steps(events: Events) -> Iterator[Step]:
    """The send of a step follows its collects; a flush belongs to the step before it."""
    decodes = of_kind(events, "decode")
    collects, issues = of_kind(events, "collect"), of_kind(events, "issue")
    flushes, sends = of_kind(events, "flush"), of_kind(events, "send")
    for index, step in enumerate(decodes):
        end = decodes["at"][index + 1] if index + 1 < len(decodes) else np.inf
        mine = _between(collects, step["at"], end)
        mine = mine[mine["size"] > 0]
        if len(mine):
            sending = _between(sends, mine["at"][0], end)
            yield Step(
                mine,
                float(_between(issues, step["at"], end)["seconds"].sum()),
                float(_between(flushes, step["at"], end)["seconds"].sum()),
                float(sending["seconds"].max()) if len(sending) else 0.0,
            )


def _between(events: Events, first: float, end: float) -> Events:
    begin, stop = np.searchsorted(events["at"], (first, end))
    return events[begin:stop]


def summary(events: Events) -> dict[str, Any]:
    """Seconds of hooks in a decode step, and of steps in which requests finished: how many, the
    tokens of the longest, and what their tickets, handing them over and sending took.
    """
    finishing = list(steps(events))
    return {
        "forward_begin": _decode_seconds(events, "forward_begin"),
        "forward_end": _decode_seconds(events, "forward_end"),
        "finalize": of_kind(events, "finalize")["seconds"].tolist(),
        "idle_issue": _without_finish(events, "issue"),
        "idle_flush": _without_finish(events, "flush"),
        "steps": [
            [
                len(step.collects),
                float(step.collects["size"].max()),
                step.ticketing,
                step.flushing,
                step.sending,
            ]
            for step in finishing
        ],
        "pinned_bytes": of_kind(events, "pinned_bytes")["size"].tolist()[-1:],
        "gpu_bytes": of_kind(events, "gpu_bytes")["size"].tolist()[-1:],
    }


def _decode_seconds(events: Events, kind: str) -> list[float]:
    some = of_kind(events, kind)
    return [float(seconds) for seconds in some[some["size"] > 0]["seconds"]]


def _without_finish(events: Events, kind: str) -> list[float]:
    """Calls that had nothing to do: since the one before no request has ended."""
    busy = of_kind(events, "collect")["at"]
    calls = of_kind(events, kind)
    ended = np.diff(np.searchsorted(busy, calls["at"]))
    return [float(seconds) for seconds in calls["seconds"][1:][ended == 0]]
