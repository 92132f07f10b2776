"""Modules of SGLang's types with the attributes that matter, no weights, no kernels.

Import it inside a test or fixture that has asked for ``sglang``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.hash_topk import HashTopK
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat


def router(layer: int, *, top_k: int = 2, captured: bool = True, inside: bool = False) -> Any:
    config = SimpleNamespace(
        top_k=top_k,
        num_shared_topk_slots=0,
        allow_routed_experts_capture=captured,
        output_format=TopKOutputFormat.BYPASSED if inside else TopKOutputFormat.STANDARD,
    )
    return _bare(TopK, layer_id=layer, is_draft=False, topk_config=config)


def experts(layer: int, number: int = 8) -> Any:
    return _bare(FusedMoE, layer_id=layer, _num_global_routed=number)


def hashed(layer: int) -> Any:
    return _bare(HashTopK, layer_id=layer, is_draft=False)


def _bare(kind: type[torch.nn.Module], **attributes: Any) -> torch.nn.Module:
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    for name, value in attributes.items():
        object.__setattr__(module, name, value)
    return module
