"""Features that the bridge refuses at start, each with its reason.

For most the native path itself is no reference (its routes are wrong or incomplete there);
for the others KV is written by something that is no forward, so tags could match rows that
are not the request's. Refusing is the promise "never wrong silently" at start-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import StartRefused


class Refusal(NamedTuple):
    """A feature, how to see that it is on, why it is refused."""

    feature: str
    is_on: Callable[[Any], Any]
    reason: str


_UNTESTED = "no test has shown its routes right"
_KV_WITHOUT_FORWARD = "it writes KV without a forward, which no tag would notice"

REFUSALS = (
    Refusal(
        "a device other than CUDA and CPU",
        lambda a: a.device not in ("cpu", "cuda"),
        "no test has shown the order of its streams right",
    ),
    Refusal("two-batch overlap", lambda a: a.enable_two_batch_overlap, _UNTESTED),
    Refusal("pp_size > 1", lambda a: a.pp_size > 1, "a stage captures only its own layers"),
    Refusal(
        "attention context parallelism",
        lambda a: a.attn_cp_size > 1 or a.dcp_size > 1 or a.enable_prefill_cp,
        "a rank captures only its own tokens",
    ),
    Refusal("diffusion LLMs", lambda a: a.dllm_algorithm, "a token has many forwards"),
    Refusal(
        "all-to-all backends (moe_a2a_backend)",
        lambda a: a.moe_a2a_backend not in (None, "none"),
        _UNTESTED,
    ),
    Refusal(
        "FP4 all-gather",
        lambda a: (
            a.moe_runner_backend == "flashinfer_cutlass"
            and a.quantization == "modelopt_fp4"
            and not a.disable_flashinfer_cutlass_moe_fp4_allgather
            and (a.enable_dp_attention or a.attn_dp_size > 1)
        ),
        "routes are gathered inside it (--disable-flashinfer-cutlass-moe-fp4-allgather)",
    ),
    Refusal(
        "DP attention with prefill CUDA graphs",
        lambda a: (
            (a.enable_dp_attention or a.attn_dp_size > 1)
            and a.cuda_graph_config.prefill.backend != "disabled"
        ),
        "SGLang looks for a rank's rows where a decode graph would have put them "
        "(--disable-prefill-cuda-graph)",
    ),
    Refusal(
        "elastic EP",
        lambda a: a.elastic_ep_backend,
        "the ranks whose tokens share a capture buffer change while it runs",
    ),
    Refusal("DWDP", lambda a: a.dwdp_size > 1, _UNTESTED),
    Refusal("hierarchical cache", lambda a: a.enable_hierarchical_cache, _KV_WITHOUT_FORWARD),
    Refusal("LMCache", lambda a: a.enable_lmcache, _KV_WITHOUT_FORWARD),
    Refusal(
        "an external KV cache linker",
        lambda a: a.enable_unified_cache_external_linker,
        _KV_WITHOUT_FORWARD,
    ),
    Refusal("HiSparse", lambda a: a.enable_hisparse, _KV_WITHOUT_FORWARD),
    Refusal(
        "PD disaggregation (disaggregation_mode)",
        lambda a: a.disaggregation_mode != "null",
        "a decode engine receives KV without a forward, and an engine may switch roles",
    ),
    Refusal("PD multiplexing", lambda a: a.enable_pdmux, "a forward is split over calls"),
    Refusal(
        "speculative decoding",
        lambda a: a.speculative_algorithm,
        "no test has shown its routes right, and some algorithms move accepted tokens' KV",
    ),
    Refusal(
        "redundant experts or EPLB",
        lambda a: a.ep_num_redundant_experts > 0 or a.enable_eplb,
        "no test has shown that the ids are logical ones",
    ),
    Refusal(
        "sliding-window replay",
        lambda a: a.enable_encoder_swa_bounded_replay or a.enable_decoder_swa_bounded_replay,
        _UNTESTED,
    ),
    Refusal("Ray actors as schedulers (use_ray)", lambda a: a.use_ray, "they load no plugins"),
    Refusal(
        "tokenizer_worker_num > 1",
        lambda a: a.tokenizer_worker_num > 1,
        "those workers load no plugins, so OpenAI requests with n > 1 would lose routes",
    ),
    Refusal(
        "gRPC servers",
        lambda a: a.grpc_mode or a.smg_grpc_mode,
        "their responses carry no routed_experts",
    ),
    Refusal("encoder-only engines", lambda a: a.encoder_only, "they have no routes"),
)


def refuse_features(arguments: Any) -> None:
    """Check ``ServerArgs`` as resolved: a view of what SGLang made of the user's input.

    Raises
    ------
    StartRefused
        A refused feature is on, or SGLang no longer says whether it is.
    """
    for refusal in REFUSALS:
        try:
            on = refusal.is_on(arguments)
        except AttributeError as error:
            raise StartRefused(
                f"this SGLang does not say whether {refusal.feature} is on ({error}); shmroute "
                "refuses to guess"
            ) from error
        if on:
            raise StartRefused(
                f"{refusal.feature} does not go with --shmroute-arena: {refusal.reason}. Turn one "
                "of them off"
            )
