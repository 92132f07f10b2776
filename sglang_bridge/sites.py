"""The places in SGLang that the bridge hooks or reads, and the check that they are there.

SGLang's plugin loader logs and swallows what goes wrong in a plugin, and an engine whose
hooks are missing would fall back to the native path unnoticed. So every site's signature
and every attribute used is checked before the engine starts, and after the hooks were
applied each is checked to be in place.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .errors import StartRefused
from .versions import is_older, version

_OLDER = is_older()
_MANAGERS = "sglang.srt.managers."
_PARTS = _MANAGERS + "scheduler_components."
_PROCESSOR = _PARTS + "batch_result_processor.SchedulerBatchResultProcessor."
_UPDATER = _PARTS + "weight_updater.SchedulerWeightUpdaterManager."
_OPENAI = "sglang.srt.entrypoints.openai."


class Site(NamedTuple):
    """A callable of SGLang and the parameters that the bridge relies on."""

    target: str
    parameters: tuple[str, ...]
    own: bool = False  # a base class has one of that name, too, which does something else


ADD_ARGUMENTS = Site("sglang.srt.server_args.ServerArgs.add_cli_args", ("parser",))
FROM_ARGUMENTS = Site("sglang.srt.server_args.ServerArgs.from_cli_args", ("args",))
RESOLVE = Site(
    "sglang.srt.server_args.ServerArgs." + ("__post_init__" if _OLDER else "resolve_once"),
    ("self",),
)
CREATE = Site(
    "sglang.srt.state_capturer.routed_experts.RoutedExpertsCapturer.create",
    ("model", "model_config", "num_tokens", "max_running_requests", "device"),
)
CREATED = Site(
    "sglang.srt.model_executor.model_runner.ModelRunner.init_routed_experts_capturer", ("self",)
)
FORWARD = Site(
    "sglang.srt.model_executor.model_runner.ModelRunner.forward", ("self", "forward_batch")
)
COLLECT = Site(_PROCESSOR + "_maybe_collect_routed_experts", ("self", "req"))
DECODED = Site(_PROCESSOR + "process_batch_result_decode", ("self", "batch", "result"))
PREFILLED = Site(_PROCESSOR + "process_batch_result_prefill", ("self", "batch", "result"))
IDLE = Site(_MANAGERS + "scheduler.Scheduler.on_idle", ("self",))
PAUSED = Site(_MANAGERS + "scheduler.Scheduler.pause_generation", ("self", "recv_req"))
STREAMED = Site(
    _PARTS + "output_streamer.SchedulerOutputStreamer._stream_output_generation",
    ("self", "reqs", "skip_req"),
)
if _OLDER:
    ABORTED = Site(
        _PARTS + "output_sender.SenderWrapper.send_output", ("self", "output", "recv_obj")
    )
else:
    ABORTED = Site(
        _MANAGERS + "scheduler.Scheduler.send_abort_output", ("self", "abort_req", "req")
    )
_BUCKETED_UPDATES = () if _OLDER else ("begin_weight_update", "end_weight_update")
UPDATES = tuple(
    Site(_UPDATER + name, ("self", "recv_req"))
    for name in (
        "update_weights_from_disk",
        "update_weights_from_distributed",
        "update_weights_from_tensor",
        "update_weights_from_ipc",
        *_BUCKETED_UPDATES,
    )
)
RELEASE_MEMORY = Site(_UPDATER + "release_memory_occupation", ("self", "recv_req"))
RESUME_MEMORY = Site(_UPDATER + "resume_memory_occupation", ("self", "recv_req"))
# An older scheduler is not told when the version changes its name without new weights.
RENAMED = (
    ()
    if _OLDER
    else (
        Site(
            _MANAGERS + "scheduler.Scheduler.record_weight_version_change",
            ("self", "new_version"),
        ),
    )
)
CHAT = Site(_OPENAI + "serving_chat.OpenAIServingChat._validate_request", ("self", "request"))
COMPLETION = Site(
    _OPENAI + "serving_completions.OpenAIServingCompletion._validate_request", ("self", "request")
)
KILLED = Site("sglang.srt.utils.common.kill_process_tree", ("parent_pid", "include_parent"))

_CAPTURER = "sglang.srt.state_capturer.routed_experts.RoutedExpertsCapturer."
# Called or overridden, not hooked.
USED = (
    Site(
        _CAPTURER + "on_forward_end",
        ("self", "forward_batch", "can_run_graph", "cuda_graph_batch", "no_copy_to_cpu"),
    ),
    Site(
        _CAPTURER + "get_topk",
        ("self", "req_pool_idx", "seqlen", "req_to_token_pool", "start_len"),
    ),
    Site(
        _CAPTURER + "_get_local_slice",
        ("self", "forward_batch", "can_run_graph", "cuda_graph_batch"),
        own=True,
    ),
    Site("sglang.srt.runtime_context.get_server_args", ()),
    Site("sglang.srt.model_executor.forward_batch_info.ForwardMode.is_decode", ("self",)),
    *(
        ()
        if _OLDER
        else (Site("sglang.srt.arg_groups.overrides.resolving_view", ("server_args",)),)
    ),
)
SCHEDULER = (
    CREATE, CREATED, FORWARD, COLLECT, DECODED, PREFILLED, IDLE, PAUSED, STREAMED, ABORTED,
    *RENAMED, *UPDATES, RELEASE_MEMORY, RESUME_MEMORY,
)  # fmt: skip
LAUNCHER = (RESOLVE, CHAT, COMPLETION, KILLED)

# Class -> attributes that the bridge reads from its instances; some differ, see ``versions``.
ATTRIBUTES = {
    **(
        {}
        if _OLDER
        else {
            "sglang.srt.managers.schedule_batch.ReqKvInfo": ("req_pool_idx",),
            "sglang.srt.layers.moe.hash_topk.HashTopK": ("layer_id", "is_draft"),
        }
    ),
    "sglang.srt.managers.schedule_batch.Req": (
        "output_ids",
        "finished_len",
        "output_ids_through_stop",  # what the two above are read as
        "session",
        "req_pool_idx" if _OLDER else "kv",
        "rid",
        "origin_input_ids",
        "sampling_params",
        "return_routed_experts",
        "routed_experts_start_len",
        "routed_experts",
        "finished_reason",
    ),
    "sglang.srt.layers.moe.topk.TopK": (
        "layer_id",
        "topk_config",
        *(() if _OLDER else ("is_draft",)),
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner": (
        "is_draft_worker",
        "capture_tail_hooks",
        "req_to_token_pool",
    ),
    # A module; its function of a similar name counts prefill graphs, too.
    "sglang.srt.model_executor.runner_utils.capture_mode": ("is_capture_mode",),
    "sglang.srt.configs.model_config.ModelConfig": ("is_multimodal",),
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager": (
        "memory_saver_adapter",
    ),
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool": ("req_to_token",),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": (
        "input_ids",
        "positions",
        "out_cache_loc",
        *(() if _OLDER else ("out_cache_loc_virtual",)),
        "contains_mm_inputs",
        "global_num_tokens_cpu",
        "forward_mode",
    ),
    "sglang.srt.layers.moe.topk.TopKConfig": (
        "top_k",
        "allow_routed_experts_capture",
        "output_format",
        "num_fused_shared_experts" if _OLDER else "num_shared_topk_slots",
    ),
    "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE": ("num_global_routed_experts",),
}


def check_sites(sites: Iterable[Site]) -> None:
    """Check that every site exists and takes the parameters that the bridge relies on.

    Raises
    ------
    StartRefused
        Naming SGLang's version and the site.
    """
    for site in sites:
        path, _, name = site.target.rpartition(".")
        if site.own and name not in vars(_resolve(path)):
            raise StartRefused(
                f"SGLang {version()} has no {site.target}, only a base class's; shmroute does not "
                "know this version. Use a version that the README lists"
            )
        taken = _parameters(site)
        missing = [p for p in site.parameters if p not in taken]
        if missing:
            raise StartRefused(
                f"SGLang {version()}: {site.target} does not take {', '.join(missing)}; shmroute "
                "does not know this version of it. Use a version that the README lists"
            )


def check_attributes() -> None:
    """Check that the attributes used exist; raises StartRefused like ``check_sites``."""
    for target, names in ATTRIBUTES.items():
        owner = _resolve(target)
        known = {*_instance_attributes(owner), *dir(owner)}
        missing = [name for name in names if name not in known]
        if missing:
            raise StartRefused(
                f"SGLang {version()}: {target} has no {', '.join(missing)}; shmroute does not "
                "know this version of it. Use a version that the README lists"
            )


def _instance_attributes(owner: type) -> Iterable[str]:
    """Fields of a dataclass; of another class what its constructor mentions, so sets or reads."""
    fields = getattr(owner, "__dataclass_fields__", None)
    if fields is not None:
        return tuple(fields)
    constructor = getattr(vars(owner).get("__init__"), "__code__", None)
    return () if constructor is None else constructor.co_names


def hook(site: Site, function: Callable[..., Any], kind: str) -> None:
    """Register a hook: ``kind`` is BEFORE, AFTER or AROUND."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if site.target in HookRegistry._patched:
        # SGLang applies a target's hooks once; a later one would be left out without a word.
        raise StartRefused(
            f"another plugin has hooked {site.target} before shmroute could: SGLANG_PLUGINS names "
            "the plugins to load, leave that one out"
        )
    HookRegistry.register(site.target, function, HookType[kind])


def apply(*hooked: Site) -> None:
    """Apply the registered hooks now, and check that each is in place: SGLang only logs."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    for site in hooked:
        # SGLang decorates some of its methods itself, so being wrapped alone is no proof.
        wrapped = hasattr(_resolve(site.target), "__wrapped__")
        if not wrapped or site.target not in HookRegistry._patched:
            raise StartRefused(f"SGLang {version()} did not apply the hook on {site.target}")


def mark_checked(arguments: Any, arena: str) -> None:
    """Note in a ``ServerArgs`` that a launcher has checked it; the note survives pickling."""
    arguments._shmroute_arena = arena


def checked_for(arguments: Any) -> str | None:
    """The arena for which a launcher has checked this ``ServerArgs``."""
    return getattr(arguments, "_shmroute_arena", None)


def _parameters(site: Site) -> set[str]:
    return set(inspect.signature(_resolve(site.target)).parameters) | {"self"}


def _resolve(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        cause = _cause(target) or error
        raise StartRefused(
            f"SGLang {version()} has no {target} ({cause}); shmroute does not know this version. "
            "Use a version that the README lists"
        ) from error


def _cause(target: str) -> str | None:
    """Why a module of the target cannot be imported: looking a name up hides that."""
    parts = target.split(".")
    for end in range(1, len(parts)):
        try:
            importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            return None if error.name == ".".join(parts[:end]) else str(error)
        except ImportError as error:
            return str(error)
    return None
