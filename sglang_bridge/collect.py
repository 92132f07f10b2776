"""What happens to a request when it ends: the scheduler's hooks on requests.

SGLang calls ``_maybe_collect_routed_experts`` for a finished request and releases its KV
cache in the next statement, which may rewrite its row of ``req_to_token`` onto another
request's locations. So the locations are copied inside that call and never read again. Nothing
else is done there: it is described and its ticket issued, with those of the other requests of the
step, where the first of their responses is made, or at the step's end (see ``publisher``).

Requests that end without that call (aborted in the queue, rejected, a discarded output)
are counted ``no_routes`` where their response is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.state_capturer.base import BaseTopkCapturer
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

from .capturer import ArenaCapturer
from .finished import Finished
from .publisher import Publisher
from .versions import request_slot_reader

slot_of = request_slot_reader()


def collect(processor: Any, req: Any) -> None:
    """In place of SGLang's ``_maybe_collect_routed_experts``."""
    if not req.return_routed_experts:
        return
    capturer = get_global_experts_capturer()
    if not isinstance(capturer, ArenaCapturer):
        return
    publisher, reason = capturer.publisher, req.finished_reason
    if publisher is None or is_hidden_warmup(req):
        return
    if isinstance(reason, FINISH_ABORT) and reason.status_code is not None:
        return  # its reply is an HTTP error without ``meta_info``
    try:
        publisher.note(_finished(req, processor.req_to_token_pool, capturer, publisher))
    except Exception as error:
        publisher.counters.add("finished")
        publisher.give_error(req, error)


def _finished(req: Any, pool: Any, capturer: ArenaCapturer, publisher: Publisher) -> Finished:
    """Take what the release of its KV cache may change: the locations, copied."""
    # Not ``output_ids_through_stop``, which copies the output to cut it off there.
    output = req.finished_len
    if output is None:
        output = len(req.output_ids)
    last = len(req.origin_input_ids) + output - 1
    start = min(req.routed_experts_start_len, last)
    slot = slot_of(req)
    if slot is None:
        raise RuntimeError("its KV cache was released before its routes were collected")
    # Before the native path, whose copy to the host would drain the stream.
    locations = publisher.gatherer.snapshot(pool.req_to_token, slot, start, last)
    native = None
    if capturer.shadow:
        native = BaseTopkCapturer.get_topk(
            capturer, slot, last + 1, pool, req.routed_experts_start_len
        )
    return Finished(req, start, last, locations, native)


def is_hidden_warmup(req: Any) -> bool:
    """The request that SGLang sends ahead of ``n > 1`` choices to fill the prefix cache."""
    parameters = req.sampling_params
    return parameters.max_new_tokens == 0 and parameters.n > 1


def flush() -> None:
    """After a batch result was processed: queue what ended in it."""
    publisher = _publisher()
    if publisher is not None:
        publisher.flush()


def idle() -> None:
    """The scheduler has found nothing to do."""
    publisher = _publisher()
    if publisher is not None:
        publisher.let_the_sealer_run()


def paused() -> None:
    """The scheduler does nothing until it is told to go on, and does not say that it is idle."""
    publisher = _publisher()
    if publisher is not None:
        publisher.wait_for_the_sealer()


def issue(reqs: Iterable[Any], skipped: Any = None) -> None:
    """A step's responses are about to be made: those of finished requests find their tickets.

    One that asked for routes, is finished and has none by then is counted. ``reqs`` are all that
    run, of which SGLang leaves ``skipped`` out.
    """
    for req in reqs:
        if req.finished_reason is not None and req is not skipped:
            _issue(req)


def _issue(req: Any) -> None:
    if req.routed_experts is not None or not req.return_routed_experts:
        return
    publisher = _publisher()
    if publisher is not None:
        publisher.issue()
        if req.routed_experts is None:
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
