"""The hooks in a scheduler process: capture, request ends, weight updates.

Imported by ``plugin`` only where SGLang's scheduler is loaded already.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import get_exec, get_server_args
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

from . import collect, sites
from .capturer import ArenaCapturer
from .errors import StartRefused
from .settings import Settings
from .versions import is_older

logger = logging.getLogger("shmroute")


@functools.cache
def register() -> None:
    """Check this SGLang and put the hooks in place.

    Raises
    ------
    StartRefused
        A site is missing, has another signature, or did not take its hook.
    """
    # An offline engine's default log level is "error": what goes inline must be said even there.
    logging.getLogger("shmroute").setLevel(logging.WARNING)
    sites.check_sites((*sites.SCHEDULER, *sites.USED))
    sites.check_attributes()
    sites.hook(sites.CREATE, _create, "AROUND")
    sites.hook(sites.CREATED, _created, "AFTER")
    sites.hook(sites.FORWARD, _forward_begins, "BEFORE")
    sites.hook(sites.COLLECT, _collect, "AROUND")
    for site in (sites.DECODED, sites.PREFILLED):
        sites.hook(site, _step_processed, "AFTER")
    sites.hook(sites.IDLE, _idle, "BEFORE")
    sites.hook(sites.PAUSED, _paused, "AFTER")
    sites.hook(sites.STREAMED, _streamed, "BEFORE")
    sites.hook(sites.ABORTED, _sent if is_older() else _aborted, "BEFORE")
    for site in sites.UPDATES:
        sites.hook(site, _weights_change, "BEFORE")
    for site in sites.RENAMED:
        sites.hook(site, _weights_renamed, "BEFORE")
    sites.hook(sites.RELEASE_MEMORY, _memory_released, "AFTER")
    sites.hook(sites.RESUME_MEMORY, _memory_resumed, "AFTER")
    sites.apply(*sites.SCHEDULER)


def _create(_original: Callable[..., Any], **arguments: Any) -> ArenaCapturer:
    if not get_exec().features.enable_return_routed_experts:
        raise StartRefused("this scheduler was started without enable_return_routed_experts")
    wanted = Settings.from_environment()
    if sites.checked_for(get_server_args()) != wanted.arena:
        raise StartRefused(
            f"nobody checked whether routes are right in this configuration, for arena "
            f"{wanted.arena}: the process that started this scheduler did not load the plugin"
        )
    return ArenaCapturer(wanted, **arguments)


def _created(_result: None, runner: Any) -> None:
    capturer = get_global_experts_capturer()
    if isinstance(capturer, ArenaCapturer) and not runner.is_draft_worker:
        capturer.look_at(runner)


def _forward_begins(runner: Any, forward_batch: Any, *_arguments: Any, **_options: Any) -> None:
    capturer = get_global_experts_capturer()
    if not isinstance(capturer, ArenaCapturer) or runner.is_draft_worker:
        return
    try:
        capturer.on_forward_begin(forward_batch)
    except Exception:
        # The forward goes on; at its end its rows are declared missing.
        logger.exception("shmroute: the beginning of a forward could not be noted")


def _collect(_original: Callable[..., Any], processor: Any, req: Any) -> None:
    collect.collect(processor, req)


def _step_processed(_result: None, *_arguments: Any, **_options: Any) -> None:
    collect.flush()


def _idle(_scheduler: Any) -> None:
    collect.idle()


def _paused(_result: None, *_arguments: Any, **_options: Any) -> None:
    collect.paused()


def _streamed(
    _streamer: Any,
    reqs: Iterable[Any],
    _return_logprob: bool = False,
    skip_req: Any = None,
    *_arguments: Any,
    **_options: Any,
) -> None:
    """Once a step: around the response of each request it would cost what all else costs."""
    collect.issue(reqs, skip_req)


def _aborted(_scheduler: Any, _abort_req: Any, req: Any) -> None:
    collect.count_aborted(req)


def _sent(_sender: Any, output: Any, recv_obj: Any = None) -> None:
    """An older scheduler sends an abort from many places; one sender carries them all."""
    if isinstance(output, AbortReq) and isinstance(recv_obj, Req):
        collect.count_aborted(recv_obj)


def _memory_released(_result: Any, updater: Any, recv_req: Any) -> None:
    capturer = get_global_experts_capturer()
    if isinstance(capturer, ArenaCapturer) and _frees_kv_cache(updater, recv_req):
        capturer.give_back_memory()


def _memory_resumed(_result: Any, updater: Any, recv_req: Any) -> None:
    capturer = get_global_experts_capturer()
    if isinstance(capturer, ArenaCapturer) and _frees_kv_cache(updater, recv_req):
        capturer.take_memory_again()


def _frees_kv_cache(updater: Any, recv_req: Any) -> bool:
    """Without the memory saver SGLang frees nothing and goes on serving."""
    named = not recv_req.tags or GPU_MEMORY_TYPE_KV_CACHE in recv_req.tags
    return named and bool(updater.memory_saver_adapter.enabled)


def _weights_change(_updater: Any, recv_req: Any) -> None:
    _begin_update(getattr(recv_req, "weight_version", None))


def _weights_renamed(_scheduler: Any, new_version: str) -> None:
    _begin_update(new_version)


def _begin_update(label: str | None) -> None:
    capturer = get_global_experts_capturer()
    if isinstance(capturer, ArenaCapturer):
        capturer.weights_change(label)
