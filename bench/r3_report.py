"""The figures of the R3 demonstration: tables for people, rows for the result file, one sentence.

Each figure has two columns, the trainer's own routing and the rollout's replayed, everything else
being the same. Over several seeds it is the mean, with the lowest and the highest of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from r3_metrics import TAUS, Comparison, Pass
from result_file import Row
from rich import box
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table; ``of`` takes it from a pass, in ``unit``, shown as ``form``."""

    name: str
    unit: str
    of: Callable[[Pass], float]
    form: str


def _extreme(tau: float) -> Figure:
    return Figure(
        f"tokens with a probability ratio beyond {tau:g}",
        "%",
        lambda each: 100 * each.extreme(tau),
        ".2f",
    )


KL = Figure("KL(rollout || trainer), k3 estimator", "nats", lambda each: each.kl, ".2e")
FIGURES = (
    Figure("routers that choose another set", "%", lambda each: 100 * each.routers, ".2f"),
    Figure("tokens with at least one of them", "%", lambda each: 100 * each.tokens, ".2f"),
    KL,
    *map(_extreme, TAUS),
)


def result_rows(comparisons: Sequence[Comparison]) -> list[Row]:
    """Rows for the result file; that replay was applied, and lowers KL, are the budgets."""
    rows = [
        Row("seeds", len(comparisons), "seeds"),
        Row("sampled tokens", sum(each.sampled for each in comparisons), "tokens"),
        Row("tokens with routes", sum(each.rows for each in comparisons), "tokens"),
        Row("entropy of the rollouts", _entropy(comparisons), "nats"),
    ]
    for seed, each in enumerate(comparisons):
        rows += [
            Row(f"seed {seed}: {KL.name}, own routing", each.own.kl, KL.unit),
            Row(f"seed {seed}: its standard error", each.own.kl_error, KL.unit),
            Row(f"seed {seed}: {KL.name}, replayed", each.replayed.kl, KL.unit, each.own.kl, "max"),
            Row(f"seed {seed}: its standard error", each.replayed.kl_error, KL.unit),
        ]
    for figure in FIGURES:
        for way, passes in _ways(comparisons):
            values = [figure.of(each) for each in passes]
            rows += [
                Row(f"{figure.name}, {way}: mean", statistics.mean(values), figure.unit),
                Row(f"{figure.name}, {way}: lowest", min(values), figure.unit),
                Row(f"{figure.name}, {way}: highest", max(values), figure.unit),
            ]
    own, replayed, used = _by_layer(comparisons)
    for layer in range(len(own)):
        rows += [
            Row(f"layer {layer}: routers that choose another set, own routing", own[layer], "%"),
            Row(
                f"layer {layer}: routers that choose another set, replayed",
                replayed[layer],
                "%",
                0,
                "max",
            ),
            Row(f"layer {layer}: experts used", used[layer], "experts"),
        ]
    return rows


def table(comparisons: Sequence[Comparison]) -> Table:
    """What R3's paper reports, without and with replay."""
    sampled = sum(each.sampled for each in comparisons)
    seeds = f" of {len(comparisons)} seeds" if len(comparisons) > 1 else ""
    shown = Table(
        box=box.SIMPLE_HEAD,
        title=f"Replay of {sampled:,} sampled tokens{seeds}: rollout bfloat16, trainer float32",
        title_justify="left",
        pad_edge=False,
    )
    shown.add_column("")
    for heading in ("own routing", "replayed"):
        shown.add_column(heading, justify="right")
    for figure in FIGURES:
        cells = [_spread(figure, passes) for _, passes in _ways(comparisons)]
        shown.add_row(figure.name, *cells)
    return shown


def layer_table(comparisons: Sequence[Comparison]) -> Table:
    """Each layer's routers: that the routes were applied, and how the experts were used."""
    num_experts = comparisons[0].expert_use.shape[1]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "another set, own routing", "replayed", "experts used"):
        shown.add_column(heading, justify="right")
    for layer, (own, replayed, used) in enumerate(zip(*_by_layer(comparisons), strict=True)):
        shown.add_row(f"{layer}", _percent(own), _percent(replayed), f"{used:.0f} of {num_experts}")
    return shown


def closing(comparisons: Sequence[Comparison]) -> str:
    """What was seen, in plain words."""
    (_, own), (_, replayed) = _ways(comparisons)
    routers = statistics.mean(100 * each.routers for each in own)
    tokens = statistics.mean(100 * each.tokens for each in own)
    wrong = sum(int(each.differs.sum()) for each in replayed)
    applied = f"{wrong:,} routers did NOT take them" if wrong else "every router took them"
    without, with_replay = (statistics.mean(map(KL.of, passes)) for passes in (own, replayed))
    lower = sum(each.replayed.kl < each.own.kl for each in comparisons)
    of_seeds = f", lower for {lower} of {len(comparisons)} seeds" if len(own) > 1 else ""
    return (
        f"A trainer with the same weights, in transformers, chose other experts than the engine in "
        f"{routers:.0f}% of the routers, at least one for {tokens:.0f}% of the tokens. With the "
        f"engine's routes replayed {applied}, and KL(rollout || trainer) went from "
        f"{without:.2e} to {with_replay:.2e} nats, {_factor(without, with_replay)}{of_seeds}."
    )


def _factor(own: float, replayed: float) -> str:
    if replayed > own:
        return f"{replayed / own:.1f} times MORE"
    return f"{own / replayed:.1f} times less"


def _ways(comparisons: Sequence[Comparison]) -> list[tuple[str, list[Pass]]]:
    return [
        ("own routing", [each.own for each in comparisons]),
        ("replayed", [each.replayed for each in comparisons]),
    ]


def _spread(figure: Figure, passes: Sequence[Pass]) -> str:
    values = [figure.of(each) for each in passes]
    if not any(values):
        return "none"
    unit = "%" if figure.unit == "%" else ""
    mean = f"{statistics.mean(values):{figure.form}}{unit}"
    if len(values) > 1:
        return f"{mean} ({min(values):{figure.form}} to {max(values):{figure.form}})"
    return f"{mean} ± {passes[0].kl_error:.0e}" if figure is KL else mean


def _percent(value: float) -> str:
    """Never rounded to none."""
    return f"{value:.2g}%" if value else "none"


def _by_layer(comparisons: Sequence[Comparison]) -> tuple[list[float], list[float], list[float]]:
    """Of each layer, means over seeds: disagreement in %, own and replayed, and experts used."""
    own = 100 * np.mean([each.own.by_layer for each in comparisons], axis=0)
    replayed = 100 * np.mean([each.replayed.by_layer for each in comparisons], axis=0)
    used = np.mean([(each.expert_use > 0).sum(axis=1) for each in comparisons], axis=0)
    return own.tolist(), replayed.tolist(), used.tolist()


def _entropy(comparisons: Sequence[Comparison]) -> float:
    """The mean of -log p of the sampled tokens."""
    return -float(np.concatenate([each.log_probs for each in comparisons]).mean())
