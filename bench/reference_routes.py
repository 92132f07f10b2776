"""Routes as transformers computes them from the same checkpoint: whose tokens are these rows?

Problem: the engine's shadow mode compares its records with SGLang's own path, which with DP
attention takes a rank's rows out of all ranks' by the same arithmetic. If that were wrong, both
would be, and a tag says only which token a row was stored for.

Approach: another implementation runs the model over the request's tokens. Its arithmetic
differs, so some choices do; but rows of other tokens agree by chance only, that is in about
``top_k / num_experts`` of the choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM


class ReferenceRoutes:
    """A checkpoint of ``small_models.qwen3_moe`` in transformers, in float32 on the CPU."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model
        self._top_k = int(self._model.config.num_experts_per_tok)

    @torch.no_grad()
    def agreement(self, tokens: Sequence[int], rows: npt.NDArray[Any]) -> float:
        """The share of a record's choices that transformers makes, too.

        Parameters
        ----------
        tokens
            Ids of a request's tokens, from the first one on.
        rows
            ``[len(tokens), moe_layers, top_k]``: where they were routed, by the engine.
        """
        threads = torch.get_num_threads()
        # Beside an engine that takes all cores, threads would only wait for one another.
        torch.set_num_threads(1)
        try:
            logits = self._model(torch.tensor([tokens]), output_router_logits=True).router_logits
        finally:
            torch.set_num_threads(threads)
        chosen = torch.stack([layer.topk(self._top_k).indices for layer in logits], dim=1).numpy()
        if chosen.shape != rows.shape:
            raise ValueError(f"rows of shape {rows.shape}, transformers has {chosen.shape}")
        same = (rows[..., :, np.newaxis] == chosen[..., np.newaxis, :]).any(axis=-1)
        return float(same.mean())
