"""What happens to a request when it ends: the scheduler's hooks on requests.

SGLang calls ``_maybe_collect_routed_experts`` for a finished request and releases its KV
cache in the next statement, which may rewrite its row of ``req_to_token`` onto another
request's locations. So the locations are copied inside that call and never read again.

Requests that end without that call (aborted in the queue, rejected, a discarded output)
are counted ``no_routes`` where their response is made.
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.state_capturer.base import BaseTopkCapturer
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

from .capturer import ArenaCapturer
from .finished import Finished
from .publisher import Publisher
from .ticket_tensor import ticket_tensor
from .versions import request_slot

logger = logging.getLogger("shmroute")


def collect(processor: Any, req: Any) -> None:
    """In place of SGLang's ``_maybe_collect_routed_experts``."""
    capturer = get_global_experts_capturer()
    if not req.return_routed_experts or not isinstance(capturer, ArenaCapturer):
        return
    publisher = capturer.publisher
    if publisher is None or is_hidden_warmup(req) or _reply_is_an_error(req):
        return
    publisher.counters.add("finished")
    try:
        request = describe(req, processor.req_to_token_pool, capturer, publisher)
        envelope = publisher.collect(request)
    except Exception as error:
        logger.exception("shmroute: no routes for rid %s", req.rid)
        publisher.counters.add("hook_errors")
        envelope = publisher.refuse(req.rid, f"{type(error).__name__}: {error}")
    req.routed_experts = ticket_tensor(envelope)


def describe(req: Any, pool: Any, capturer: ArenaCapturer, publisher: Publisher) -> Finished:
    """Read off a finished request what its record needs, locations copied."""
    prompt, output = req.origin_input_ids, req.output_ids_through_stop
    seqlen = len(prompt) + len(output)
    start = min(req.routed_experts_start_len, seqlen - 1)
    tokens = seqlen - 1 - start
    slot = request_slot(req)
    if slot is None:
        raise RuntimeError("its KV cache was released before its routes were collected")
    # Before the native path, whose copy to the host would drain the stream.
    locations = publisher.gatherer.snapshot(pool.req_to_token, slot, start, seqlen - 1)
    native = None
    if capturer.shadow:
        native = BaseTopkCapturer.get_topk(
            capturer, slot, seqlen, pool, req.routed_experts_start_len
        )

    def token_ids() -> npt.NDArray[np.int64]:
        # Called on another thread: slices copy under the interpreter lock, and no buffer of
        # a list that the scheduler may still append to is held open.
        ids = _as_array(prompt[: seqlen - 1])
        rest = seqlen - 1 - len(prompt)
        if rest > 0:
            ids = np.concatenate((ids, _as_array(output[:rest])))
        return ids[start:]

    return Finished(
        rid=str(req.rid),
        start=start,
        tokens=tokens,
        prompt_tokens=len(prompt),
        locations=locations,
        token_ids=token_ids,
        native=native,
    )


def _as_array(ids: Any) -> npt.NDArray[np.int64]:
    """A slice of token ids. Of an ``array`` it shares the memory: element by element a long
    one would take the interpreter from the scheduler for a third of a millisecond."""
    if isinstance(ids, array) and ids.typecode == "q":
        return np.frombuffer(ids, dtype=np.int64)
    return np.array(ids, dtype=np.int64)


def is_hidden_warmup(req: Any) -> bool:
    """The request that SGLang sends ahead of ``n > 1`` choices to fill the prefix cache."""
    parameters = req.sampling_params
    return parameters.max_new_tokens == 0 and parameters.n > 1


def _reply_is_an_error(req: Any) -> bool:
    """Rejected with a status code: the reply is an HTTP error without ``meta_info``."""
    reason = req.finished_reason
    return isinstance(reason, FINISH_ABORT) and reason.status_code is not None


def flush() -> None:
    """After a batch result was processed: queue what was collected in it."""
    publisher = _publisher()
    if publisher is not None:
        publisher.flush()


def count_streamed(req: Any) -> None:
    """A response is made: count it if it asked for routes, is finished and has none."""
    if req.return_routed_experts and req.finished() and req.routed_experts is None:
        _count_without_routes(req)


def count_aborted(req: Any) -> None:
    """A request ends outside the output stream, without routes."""
    if getattr(req, "return_routed_experts", False):
        _count_without_routes(req)


def _count_without_routes(req: Any) -> None:
    publisher = _publisher()
    if publisher is None or is_hidden_warmup(req) or getattr(req, "_shmroute_counted", False):
        return
    req._shmroute_counted = True
    publisher.counters.add("finished")
    publisher.counters.add("no_routes")


def _publisher() -> Publisher | None:
    capturer = get_global_experts_capturer()
    return capturer.publisher if isinstance(capturer, ArenaCapturer) else None
