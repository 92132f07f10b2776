"""Rollouts as RL samples them: at temperature 1, with the engine's own log-probabilities.

Each prompt is random token ids, no two alike, so that every token is computed by the engine in
these very forwards. Prompts depend on the seed alone; what is sampled, on the engine's batches,
too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

REQUEST_TIMEOUT = 600.0
PROMPT_TOKENS = (16, 64)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A finished request.

    Attributes
    ----------
    tokens
        Ids of prompt and answer, the last sampled token included.
    log_probs
        The engine's, of the answer's tokens, that is of the last ones of ``tokens``.
    """

    rid: str
    tokens: list[int]
    log_probs: list[float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_prompts(model: Path, count: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ordinary tokens, `PROMPT_TOKENS` of them each."""
    # torch and transformers take seconds to import.
    from small_models import SPECIAL_TOKENS, shape_of

    chance = np.random.default_rng(seed)
    vocab = shape_of(model).vocab_size
    lengths = chance.integers(*PROMPT_TOKENS, size=count, endpoint=True)
    return [chance.integers(len(SPECIAL_TOKENS), vocab, length).tolist() for length in lengths]


def sample(
    url: str,
    prompts: list[list[int]],
    *,
    name: str,
    new_tokens: int,
    on_finished: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """Sample ``new_tokens`` behind each prompt, all at once; rids begin with ``name``."""

    async def sample_all() -> list[Rollout]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=url, trust_env=False, timeout=REQUEST_TIMEOUT, limits=limits
        ) as client:

            async def one(index: int, prompt: list[int]) -> Rollout:
                rollout = await _sample_one(client, f"{name}-{index:03d}", prompt, new_tokens)
                on_finished()
                return rollout

            return await asyncio.gather(*(one(*each) for each in enumerate(prompts)))

    return asyncio.run(sample_all())


async def _sample_one(
    client: httpx.AsyncClient, rid: str, prompt: list[int], new_tokens: int
) -> Rollout:
    request = {
        "rid": rid,
        "input_ids": prompt,
        "sampling_params": {"temperature": 1, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "return_routed_experts": True,
    }
    response = await client.post("/generate", json=request)
    answer = response.raise_for_status().json()
    log_probs, ids = zip(
        *(each[:2] for each in answer["meta_info"]["output_token_logprobs"]), strict=True
    )
    if list(ids) != answer["output_ids"]:
        raise ValueError(f"rid {rid}: log-probabilities of other tokens than those sampled")
    return Rollout(rid, [*prompt, *ids], list(log_probs))
