"""Every refused feature, on real ``ServerArgs`` that SGLang resolved, stops the start."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_bridge.errors import StartRefused
from sglang_bridge.refused import REFUSALS, refuse_features

# Feature -> arguments that turn it on, each of them alone.
ON: dict[str, list[dict[str, Any]]] = {
    "a device other than CUDA and CPU": [{"device": "xpu"}, {"device": "npu"}],
    "two-batch overlap": [{"enable_two_batch_overlap": True}],
    "pp_size > 1": [{"pp_size": 2}],
    "attention context parallelism": [
        {"attn_cp_size": 2, "tp_size": 2},
        {"dcp_size": 2, "tp_size": 2},
        {"enable_prefill_cp": True},
    ],
    "diffusion LLMs": [{"dllm_algorithm": "LowConfidence"}],
    "all-to-all backends (moe_a2a_backend)": [
        {"moe_a2a_backend": backend, "tp_size": 2} for backend in ("deepep", "mooncake")
    ],
    "FP4 all-gather": [
        {
            "moe_runner_backend": "flashinfer_cutlass",
            "quantization": "modelopt_fp4",
            "tp_size": 2,
            **parallel,
        }
        for parallel in ({"enable_dp_attention": True, "dp_size": 2}, {"attn_dp_size": 2})
    ],
    "DP attention with prefill CUDA graphs": [
        {
            **parallel,
            "tp_size": 2,
            "attention_backend": "triton",
            "cuda_graph_backend_prefill": graphs,
        }
        for parallel in ({"enable_dp_attention": True, "dp_size": 2}, {"attn_dp_size": 2})
        for graphs in ("full", "breakable")
    ],
    "elastic EP": [{"elastic_ep_backend": "mooncake", "tp_size": 2}],
    "DWDP": [{"dwdp_size": 2, "tp_size": 2}],
    "hierarchical cache": [{"enable_hierarchical_cache": True}],
    "LMCache": [{"enable_lmcache": True}],
    "an external KV cache linker": [{"enable_unified_cache_external_linker": True}],
    "HiSparse": [{"enable_hisparse": True}],
    "PD disaggregation (disaggregation_mode)": [
        {"disaggregation_mode": mode} for mode in ("prefill", "decode")
    ],
    "PD multiplexing": [{"enable_pdmux": True}],
    "speculative decoding": [
        {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": 3,
            "speculative_num_draft_tokens": 8,
            "speculative_eagle_topk": 4,
        },
        {"speculative_algorithm": "NGRAM"},
    ],
    "redundant experts or EPLB": [
        {"ep_num_redundant_experts": 2, "tp_size": 2},
        {"enable_eplb": True, "tp_size": 2},
    ],
    "sliding-window replay": [
        {"enable_encoder_swa_bounded_replay": True},
        {"enable_decoder_swa_bounded_replay": True},
    ],
    "Ray actors as schedulers (use_ray)": [{"use_ray": True}],
    "tokenizer_worker_num > 1": [{"tokenizer_worker_num": 2}],
    "gRPC servers": [{"grpc_mode": True}, {"smg_grpc_mode": True}],
    "encoder-only engines": [{"encoder_only": True}],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which SGLang's resolution reads the config only."""
    from small_models import qwen3_moe

    return qwen3_moe(
        tmp_path_factory.mktemp("model"), num_experts=8, layers=1, hidden=32, expert_width=8
    )


@pytest.fixture
def resolve(sglang: SimpleNamespace, checkpoint: Path) -> Any:
    """A view of ``ServerArgs`` as far as SGLang resolves them on this machine."""

    def resolve(**given: Any) -> Any:
        arguments = sglang.ServerArgs(
            model_path=str(checkpoint),
            skip_tokenizer_init=True,
            **{"device": "cpu", "attention_backend": "torch_native", **given},
        )
        try:
            arguments.resolve_once()
        except Exception:
            # This machine has not the hardware or this model not the shape for the feature,
            # so SGLang refuses it first. On others it does not.
            assert given
        return sglang.resolving_view(arguments)

    return resolve


def test_every_refusal_is_tried_here() -> None:
    assert set(ON) == {refusal.feature for refusal in REFUSALS}


def test_an_engine_without_any_of_them_is_not_refused(resolve: Any) -> None:
    refuse_features(resolve())
    refuse_features(resolve(tp_size=2))
    refuse_features(resolve(dp_size=2))
    refuse_features(resolve(dp_size=2, tp_size=2, enable_dp_attention=True))
    refuse_features(resolve(enable_mixed_chunk=True, chunked_prefill_size=512, page_size=16))


def test_dp_attention_is_not_refused_once_prefill_graphs_are_off_as_the_refusal_says(
    resolve: Any,
) -> None:
    shared = {"tp_size": 2, "attn_dp_size": 2, "device": "cuda", "attention_backend": "triton"}
    with pytest.raises(StartRefused, match="--disable-prefill-cuda-graph"):
        refuse_features(resolve(**shared, cuda_graph_backend_prefill="breakable"))
    decode_graphs = resolve(**shared, disable_prefill_cuda_graph=True)
    assert decode_graphs.cuda_graph_config.decode.backend == "full"
    refuse_features(decode_graphs)


@pytest.mark.parametrize(
    ("feature", "given"),
    [(feature, given) for feature, ways in ON.items() for given in ways],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_a_refused_feature_is_named_with_its_reason(
    feature: str, given: dict[str, Any], resolve: Any
) -> None:
    resolved = resolve(**given)
    refusal = next(refusal for refusal in REFUSALS if refusal.feature == feature)
    assert refusal.is_on(resolved)
    # Alone it also stops the start: of two features that are on the first is named.
    named = next(refusal for refusal in REFUSALS if refusal.is_on(resolved))
    with pytest.raises(StartRefused) as refused:
        refuse_features(resolved)
    assert str(refused.value).startswith(f"{named.feature} does not go with --shmroute-arena: ")
    assert named.reason in str(refused.value)


def test_what_sglang_chose_by_itself_is_refused_like_what_the_user_gave(
    sglang: SimpleNamespace, resolve: Any, checkpoint: Path
) -> None:
    """The record keeps the user's input (None here); the choice is only in the view of it."""
    arguments = sglang.ServerArgs(model_path=str(checkpoint), device="cpu")
    sglang.declare_resolution(arguments, "auto choice", moe_a2a_backend="deepep")
    assert arguments.moe_a2a_backend != "deepep"
    with pytest.raises(StartRefused, match="all-to-all backends"):
        refuse_features(sglang.resolving_view(arguments))


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.feature)
def test_an_sglang_that_no_longer_says_whether_a_feature_is_on_is_refused(refusal: Any) -> None:
    with pytest.raises(StartRefused, match="does not say whether") as refused:
        refuse_features(SimpleNamespace())
    assert "refuses to guess" in str(refused.value)
    with pytest.raises(AttributeError):
        refusal.is_on(SimpleNamespace())


def test_the_check_speaks_of_the_sglang_that_is_installed() -> None:
    from sglang_bridge import sites

    assert sites.version() == importlib.metadata.version("sglang")
