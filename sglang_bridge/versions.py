"""What differs between the SGLang versions that the bridge knows, in one place.

The hook sites are the same, what the bridge reads there is not. Two versions are tested:
0.5.23, and 0.5.17, the newest that goes with torch 2.11. Any other is checked like these
(``sites``), against the newer form from 0.5.23 on and against the older one before.
"""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import re
from collections.abc import Callable
from typing import Any

TESTED = ("0.5.17", "0.5.23")

# Arguments that 0.5.23 has and the older versions do not: there the feature does not exist.
_LATER_ARGUMENTS = {
    "attn_dp_size": 1,
    "enable_encoder_swa_bounded_replay": False,
    "enable_decoder_swa_bounded_replay": False,
    "enable_unified_cache_external_linker": False,
}


@functools.cache
def version() -> str:
    """SGLang's version; one that runs out of a source folder has no distribution to ask."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        import sglang

        return str(sglang.__version__)


def is_older() -> bool:
    """Whether this SGLang has the form of 0.5.17. Asked at every step."""
    return _has_older_form(version())


@functools.cache
def _has_older_form(number: str) -> bool:
    return [int(part) for part in re.findall(r"\d+", number)[:3]] < [0, 5, 23]


class _WithLaterArguments:
    """A resolved ``ServerArgs`` of an older SGLang, with the newer arguments at "off"."""

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        if name in _LATER_ARGUMENTS and not hasattr(self._arguments, name):
            return _LATER_ARGUMENTS[name]
        return getattr(self._arguments, name)


def resolved_arguments(arguments: Any) -> Any:
    """What SGLang made of a ``ServerArgs``; the newer record itself keeps what the user gave."""
    from sglang.srt.arg_groups import overrides

    if is_older():
        return _WithLaterArguments(arguments)
    return overrides.resolving_view(arguments)


def request_slot_reader() -> Callable[[Any], int | None]:
    """Reads off a request its row of ``req_to_token``; None once its KV cache was released.

    Made once: asking for the version at each request costs more than reading.
    """
    return operator.attrgetter("req_pool_idx" if is_older() else "kv.req_pool_idx")


def is_draft_router(router: Any) -> bool:
    """Whether a router belongs to a draft model. The older target model has none of those."""
    return not is_older() and router.is_draft


def shared_slots(topk_config: Any) -> int:
    """Columns of a router's top-k that are fused shared experts."""
    if is_older():
        return int(topk_config.num_fused_shared_experts)
    return int(topk_config.num_shared_topk_slots)


def routes_inside_kernel(topk_config: Any) -> bool:
    """Whether an older router that was given no output format will choose the experts inside.

    It decides at each forward, by the backend; a newer one has decided by its start.
    """
    if not is_older() or topk_config.output_format is not None:
        return False
    from sglang.srt.layers.moe import get_moe_runner_backend

    backend = get_moe_runner_backend()
    return bool(
        backend.is_triton_kernels()
        or backend.is_flashinfer_trtllm()
        or backend.is_flashinfer_mxfp4()
    )


def fused_shared_experts(model: Any) -> int:
    """Columns of the capture buffer that are fused shared experts."""
    if not is_older():
        return int(model.shared_experts_config.num_fused_shared_experts)
    from sglang.srt.runtime_context import get_exec

    if get_exec().moe.disable_shared_experts_fusion:
        return 0
    return int(getattr(model, "num_fused_shared_experts", 0))


def kv_locations_reader() -> Callable[[Any], Any]:
    """Reads off a forward's batch the KV locations it writes, in ``req_to_token``'s numbering.

    Made once, like ``request_slot_reader``.
    """
    return operator.attrgetter("out_cache_loc") if is_older() else _virtual_locations


def _virtual_locations(forward_batch: Any) -> Any:
    virtual = forward_batch.out_cache_loc_virtual
    return forward_batch.out_cache_loc if virtual is None else virtual


def data_parallel_ranks() -> int:
    """Ranks whose tokens share one capture buffer."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return int(parallel.dp_size if is_older() else parallel.num_dp_ranks)


def routes_stay(arguments: Any) -> bool:
    """Whether the tensor that a router hands over holds its routes until the forward's end.

    Not where a compiler plans the memory, and where experts on the CPU or on other ranks have
    ``topk_ids`` rewritten. ``arguments`` as resolved.
    """
    return bool(
        not arguments.enable_torch_compile
        and arguments.kt_weight_path is None
        and arguments.ep_size == 1
    )


def decode_graphs_store_routes(arguments: Any) -> bool:
    """Whether a decode graph has, at its end, all that its routes are stored with.

    Not where its routers' tensors do not, where a graph is cut into pieces, where a graph's KV
    locations are not those of ``req_to_token``, and where a prefill graph is captured as a decode
    graph is (a whole one, with LoRA), which ``decode_graph_capture_reader`` cannot tell from one.
    ``arguments`` as resolved.
    """
    return bool(
        routes_stay(arguments)
        and arguments.cuda_graph_config.decode.backend == "full"
        and not arguments.enable_unified_memory
        and arguments.cuda_graph_config.prefill.backend != "full"
    )


def decode_graph_capture_reader() -> Callable[[], bool]:
    """Tells whether SGLang captures a decode graph on the calling thread's stream right now, where
    ``decode_graphs_store_routes``. Asked at each layer of a prefill, so it imports nothing then.

    Prefill graphs are not captured in this mode, but for whole ones with LoRA.
    """
    import torch
    from sglang.srt.model_executor.runner_utils import capture_mode

    stream_captures = torch.cuda.is_current_stream_capturing

    def captures() -> bool:
        return bool(capture_mode.is_capture_mode) and stream_captures()

    return captures
