"""How far a trainer's routing and policy are from the rollout's, in the figures of R3.

Problem: "replay helps" is a sentence until it says of which tokens, by which estimator and
against what. These are the quantities that Rollout Routing Replay (arXiv 2510.11370) reports,
each defined once.

Definitions, with ``d = log p_trainer - log p_rollout`` of a sampled token under the same prefix,
at temperature 1:

KL(rollout || trainer)
    The mean over the sampled tokens of ``exp(d) - 1 - d`` (the "k3" estimator). The tokens are
    samples of the rollout's policy, under which ``exp(d)`` has the mean 1: no bias, no negative
    term.
extreme tokens at tau
    The share of sampled tokens with ``exp(d) > tau`` or ``exp(d) < 1 / tau``.
routers that disagree
    The share of (token, MoE layer) pairs for which the trainer's experts were handed another set
    than the rollout's were. Prompt tokens count; a sequence's last token, which the rollout
    never forwarded, does not.
tokens that disagree
    The share of these tokens with at least one such layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

#: What the share of extreme tokens is given for; the paper's is 2.
TAUS = (1.1, 1.5, 2.0)


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One forward of the trainer over all rollouts, held against the engine's.

    Attributes
    ----------
    log_ratio
        ``float64 [sampled]``: the ``d`` of each sampled token.
    differs
        ``bool [tokens, moe_layers]``: the experts are another set than the rollout's.
    """

    log_ratio: npt.NDArray[np.float64]
    differs: npt.NDArray[np.bool_]

    @property
    def kl(self) -> float:
        """KL(rollout || trainer) in nats a token."""
        return float(self._k3().mean())

    @property
    def kl_error(self) -> float:
        """Standard error of ``kl``."""
        terms = self._k3()
        return float(terms.std(ddof=1) / np.sqrt(len(terms)))

    def extreme(self, tau: float) -> float:
        """Share of sampled tokens whose probability ratio is beyond ``tau``."""
        return float((np.abs(self.log_ratio) > np.log(tau)).mean())

    @property
    def routers(self) -> float:
        """Share of routers that disagree."""
        return float(self.differs.mean())

    @property
    def tokens(self) -> float:
        """Share of tokens that disagree."""
        return float(self.differs.any(axis=1).mean())

    @property
    def by_layer(self) -> npt.NDArray[np.float64]:
        """``float64 [moe_layers]``: share of routers that disagree in each layer."""
        share: npt.NDArray[np.float64] = self.differs.mean(axis=0)
        return share

    def _k3(self) -> npt.NDArray[np.float64]:
        terms: npt.NDArray[np.float64] = np.expm1(self.log_ratio) - self.log_ratio
        return terms


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """One set of rollouts, computed again with the trainer's own routing and with replay.

    Attributes
    ----------
    log_probs
        ``float64 [sampled]``: the rollout's, of its sampled tokens.
    own, replayed
        The trainer's passes, its tokens in the same order.
    expert_use
        ``int64 [moe_layers, num_experts]``: how often the rollout chose each expert.
    """

    log_probs: npt.NDArray[np.float64]
    own: Pass
    replayed: Pass
    expert_use: npt.NDArray[np.int64]

    @property
    def sampled(self) -> int:
        return len(self.log_probs)

    @property
    def rows(self) -> int:
        """Tokens whose routes are known."""
        return len(self.own.differs)

    def save(self, path: Path | str) -> None:
        """Write it as an ``.npz`` file."""
        np.savez(
            path,
            log_probs=self.log_probs,
            own_log_ratio=self.own.log_ratio,
            own_differs=self.own.differs,
            replayed_log_ratio=self.replayed.log_ratio,
            replayed_differs=self.replayed.differs,
            expert_use=self.expert_use,
        )

    @classmethod
    def load(cls, path: Path | str) -> Comparison:
        """Read what ``save`` wrote."""
        with np.load(path) as saved:
            return cls(
                log_probs=saved["log_probs"],
                own=Pass(saved["own_log_ratio"], saved["own_differs"]),
                replayed=Pass(saved["replayed_log_ratio"], saved["replayed_differs"]),
                expert_use=saved["expert_use"],
            )


def differing_sets(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where two arrays of routes ``[..., top_k]`` are other sets: ``bool [...]``."""
    differs: npt.NDArray[np.bool_] = (np.sort(one, axis=-1) != np.sort(other, axis=-1)).any(axis=-1)
    return differs
