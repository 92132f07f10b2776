"""The picture of the R3 demonstration: policies and routers without and with replay, expert use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from r3_metrics import Comparison, Pass

OWN, REPLAYED = "tab:red", "tab:blue"


def draw(path: Path | str, comparisons: Sequence[Comparison], title: str) -> None:
    """Write a PNG: KL by seed, extreme tokens by tau, disagreement and expert use by layer."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    (policy, extreme), (routers, experts) = figure.subplots(2, 2)
    _kl(policy, comparisons)
    _extreme_tokens(extreme, comparisons)
    _disagreement(routers, comparisons)
    _expert_use(experts, comparisons)
    figure.savefig(path, dpi=110, format="png")


def _kl(axes: Any, comparisons: Sequence[Comparison]) -> None:
    seeds = np.arange(len(comparisons))
    for name, colour, passes in _ways(comparisons):
        axes.errorbar(
            seeds,
            [each.kl for each in passes],
            yerr=[each.kl_error for each in passes],
            color=colour,
            fmt="o",
            capsize=4,
            label=name,
        )
    axes.set(yscale="log", xlabel="seed", ylabel="nats a token", title="KL(rollout || trainer)")
    axes.set_xticks(seeds)
    axes.legend(loc="center right")


def _extreme_tokens(axes: Any, comparisons: Sequence[Comparison]) -> None:
    taus = np.geomspace(1.005, 4, 100)
    for name, colour, passes in _ways(comparisons):
        shares = np.array([[100 * each.extreme(tau) for tau in taus] for each in passes])
        # Logarithmic axes have no zero: where no token is left the line ends.
        mean = np.where(shares.mean(0) > 0, shares.mean(0), np.nan)
        axes.plot(taus, mean, color=colour, label=name)
        axes.fill_between(taus, shares.min(0), shares.max(0), color=colour, alpha=0.2)
    axes.axvline(2, color="grey", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="tau", ylabel="% of sampled tokens")
    axes.set_xticks([1, 1.1, 1.5, 2, 4], ["1", "1.1", "1.5", "2", "4"], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title("probability ratio beyond tau")
    axes.legend()


def _disagreement(axes: Any, comparisons: Sequence[Comparison]) -> None:
    for name, colour, passes in _ways(comparisons):
        shares = 100 * np.array([each.by_layer for each in passes])
        layers = np.arange(shares.shape[1])
        axes.plot(layers, shares.mean(0), color=colour, marker="o", markersize=3, label=name)
        axes.fill_between(layers, shares.min(0), shares.max(0), color=colour, alpha=0.2)
    axes.set(
        xlabel="layer", ylabel="% of tokens", title="another set of experts than the rollout's"
    )
    axes.legend()


def _expert_use(axes: Any, comparisons: Sequence[Comparison]) -> None:
    use = comparisons[0].expert_use
    relative = use / use.mean(axis=1, keepdims=True)
    drawn = axes.imshow(relative, aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
    axes.figure.colorbar(drawn, ax=axes, label="times the layer's mean")
    axes.set(xlabel="expert", ylabel="layer", title="expert use in the rollout, first seed")


def _ways(comparisons: Sequence[Comparison]) -> list[tuple[str, str, list[Pass]]]:
    return [
        ("own routing", OWN, [each.own for each in comparisons]),
        ("routes replayed", REPLAYED, [each.replayed for each in comparisons]),
    ]
