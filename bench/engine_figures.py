"""From what the workers of ``engine.py`` wrote to the rows of its result file.

Every run is one engine start, or with ``--rounds`` one turn of an engine. A figure of a
configuration is the median over its loads, over all its runs; a ratio is that of two such medians,
taken from runs that alternate. Budgets hold on a GPU only: on a CPU the numbers show that the way
works, not how fast.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import engine_memory
import numpy as np
from engine_setup import CONFIGURATIONS, dimensions
from result_file import Row, Sense

MS, US, MIB = 1e3, 1e6, 1 / 2**20
ROUTED = tuple(name for name in CONFIGURATIONS if name != "off")
INTERVAL_LOADS, INTERVAL_DRAWS = 4, 10_000  # with fewer loads an interval says nothing
STEPS_SHOWN = (1, 4, 160)  # finished requests in one step
SAME_STEP_SECONDS = 0.01  # between requests that finish in one step, and no more
AROUND_SECONDS = 0.05, 0.25  # before and behind a request's last chunk
#: Where rows are delivered to, and in how many ms out of an arena at most.
DELIVERIES = (("host", "trainer", 1.5), ("cuda", "trainer's GPU", 2.5))

Run = dict[str, Any]


@dataclass(slots=True)
class Figures:
    """Collects rows from all runs."""

    runs: Sequence[Run]
    rows: list[Row] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return any(run["gpu"] for run in self.runs)

    def add(
        self, name: str, value: float, unit: str, budget: float | None = None, sense: Sense = "max"
    ) -> None:
        if budget is None or not self.gpu:
            self.rows.append(Row(name, float(value), unit))
        else:
            self.rows.append(Row(name, float(value), unit, budget, sense))

    def always(self, name: str, value: float, unit: str, budget: float) -> None:
        """A figure whose budget does not depend on the machine."""
        self.rows.append(Row(name, float(value), unit, budget, "max"))

    def of(self, configuration: str) -> Iterable[Run]:
        return (run for run in self.runs if run["configuration"] == configuration)

    def engines(self, configuration: str) -> list[Run]:
        """The last run of each engine, which it is by the seconds that its start took."""
        return list({run["start_seconds"]: run for run in self.of(configuration)}.values())

    def loads(self, configuration: str, block: str) -> list[Any]:
        return [load for run in self.of(configuration) for load in run.get(block, ())]

    def traced(self, configuration: str) -> bool:
        return any(run.get("trace") for run in self.of(configuration))

    def traces(self, configuration: str, *blocks: str) -> list[Any]:
        return [one for one in self.loads(configuration, "trace") if one["block"] in blocks]


def result_rows(runs: Sequence[Run]) -> list[Row]:
    """All figures that these runs allow."""
    figures = Figures(runs)
    for part in (
        _starts, _throughput, _turns, _steady, _inter_token, _latency, _bytes, _memory, _counters,
        _hooks, _finishes,
    ):  # fmt: skip
        part(figures)
    return figures.rows


def _starts(figures: Figures) -> None:
    for name in CONFIGURATIONS:
        starts = [run["start_seconds"] for run in figures.engines(name)]
        if starts:
            figures.add(f"{name}: engines started", len(starts), "")
            figures.add(f"{name}: start, median", statistics.median(starts), "s")


# -- tokens per second ---------------------------------------------------------------------------


def _throughput(figures: Figures) -> None:
    _rates(figures, "throughput", "all finish in one step", 99.8)
    opened = [load["last_open_seconds"] for load in figures.loads("arena", "throughput")]
    if opened:
        what = "arena, all finish in one step: from the last response to the last record's opening"
        figures.add(what, statistics.median(opened) * MS, "ms")
    _rates(figures, "together", "sent in one request", 99.8)
    for name in ROUTED:
        rates = [load["tokens_per_second"] for load in figures.loads(name, "unasked")]
        if rates:
            figures.add(f"{name}, nobody asks: output", statistics.median(rates), "tok/s")


def _turns(figures: Figures) -> None:
    """Each configuration with all rows of every turn, and with those that are new to it."""
    off = [load["tokens_per_second"] for load in figures.loads("off", "turns")]
    for name in CONFIGURATIONS:
        for deltas, how in ((False, ""), (True, " with start_len")):
            loads = [load for load in figures.loads(name, "turns") if load["deltas"] == deltas]
            if not loads:
                continue
            rates = [load["tokens_per_second"] for load in loads]
            what = f"{name}{how}, several turns"
            figures.add(f"{what}: output", statistics.median(rates), "tok/s")
            _add_spread(figures, what, rates)
            if name != "off":
                sizes = loads[0]["route_bytes"]
                figures.add(f"{what}: response bytes for routes, all turns", sum(sizes), "B")
                figures.add(f"{what}: the same, last turn", sizes[-1], "B")
            figures.add(f"{what}: whole response, last turn", loads[0]["response_bytes"][-1], "B")
            if name != "off" and off:
                share = 100 * statistics.median(rates) / statistics.median(off)
                figures.add(f"{what}: output / off", share, "%")


def _steady(figures: Figures) -> None:
    _rates(figures, "steady", "finishes spread out", None)


def _rates(figures: Figures, block: str, what: str, budget: float | None) -> None:
    rates, medians = {}, {}
    for name in CONFIGURATIONS:
        each = [load["tokens_per_second"] for load in figures.loads(name, block)]
        if each:
            rates[name], medians[name] = each, statistics.median(each)
            figures.add(f"{name}, {what}: output", medians[name], "tok/s")
            _add_spread(figures, f"{name}, {what}", each)
    for name in ROUTED:
        if name in medians and "off" in medians:
            share = 100 * medians[name] / medians["off"]
            # Of two engines of which one is traced that is not the arena's share alone.
            alike = figures.traced(name) == figures.traced("off")
            limit = budget if name == "arena" and alike else None
            figures.add(f"{name} / off, {what}: output", share, "%", limit, "min")
            _add_interval(figures, f"{name} / off, {what}: output", rates, name, 100, "%")


def _add_spread(figures: Figures, what: str, values: Sequence[float]) -> None:
    if len(values) > 1:
        spread = 100 * (max(values) - min(values)) / statistics.median(values)
        figures.add(f"{what}: spread of {len(values)}", spread, "%")


def _add_interval(
    figures: Figures,
    what: str,
    values: Mapping[str, Sequence[float]],
    name: str,
    scale: float,
    unit: str,
) -> None:
    """Between which bounds a ratio of medians to that without routes lies, by drawing the loads
    again; how engines of other starts differ it does not say.
    """
    if min(len(values[name]), len(values["off"])) < INTERVAL_LOADS:
        return
    random = np.random.default_rng(5)
    above, below = (
        np.median(random.choice(loads, (INTERVAL_DRAWS, len(loads))), axis=1)
        for loads in (values[name], values["off"])
    )
    low, high = np.percentile(scale * above / below, (2.5, 97.5))
    figures.add(f"{what}, 95% interval, low", low, unit)
    figures.add(f"{what}, 95% interval, high", high, unit)


# -- inter-token latency -------------------------------------------------------------------------

QUANTILES: tuple[tuple[str, Callable[[Any], float], float | None], ...] = (
    ("p50", lambda gaps: float(np.percentile(gaps, 50)), None),
    ("p99", lambda gaps: float(np.percentile(gaps, 99)), 1.02),
    ("p99.9", lambda gaps: float(np.percentile(gaps, 99.9)), None),
    ("max", lambda gaps: float(np.max(gaps)), 1.1),
)


def _inter_token(figures: Figures) -> None:
    cut = sum(load["windows_cut"] for run in figures.runs for load in run.get("itl", ()))
    if cut:
        figures.add("ITL windows that the streams' end cut short", cut, "")
    names = dict.fromkeys(load["name"] for run in figures.runs for load in run.get("itl", ()))
    for length in names:
        for quantile, of, limit in QUANTILES:
            what = f"{length} requests finish: ITL {quantile}"
            _gap_figures(figures, length, what, lambda load: load["gaps"], of, limit)
        for count, how in ((1, "one finishes"), (4, "four finish at once")):
            for quantile, of, _ in QUANTILES:
                what = f"{length}, around where {how}: ITL {quantile}"
                beside = functools.partial(_gaps_around, count=count)
                _gap_figures(figures, length, what, beside, of, None)


def _gap_figures(
    figures: Figures,
    length: str,
    what: str,
    gaps_of: Callable[[Any], Sequence[float]],
    of: Callable[[Any], float],
    limit: float | None,
) -> None:
    values: dict[str, list[float]] = {}
    for name in CONFIGURATIONS:
        loads = [one for one in figures.loads(name, "itl") if one["name"] == length]
        each = [of(gaps) for gaps in map(gaps_of, loads) if len(gaps)]
        if each:
            values[name] = each
            median = statistics.median(each)
            figures.add(f"{name}, {what}, median of {len(each)} runs", median, "ms")
            if what.endswith("max"):
                figures.add(f"{name}, {what}, worst run", max(each), "ms")
    for name in ROUTED:
        if name in values and "off" in values:
            ratio = statistics.median(values[name]) / statistics.median(values["off"])
            ratio_of = f"{name} / off, {what}"
            figures.add(ratio_of, ratio, "x", limit if name == "arena" else None)
            _add_interval(figures, ratio_of, values, name, 1, "x")


def _gaps_around(load: Any, count: int) -> list[float]:
    """Gaps that end near a moment in which so many requests finished; none of older runs, which do
    not say when their gaps ended.
    """
    finished = np.array(sorted(load["finish_times"]))
    moments = np.split(finished, np.flatnonzero(np.diff(finished) > SAME_STEP_SECONDS) + 1)
    ends = np.array(load.get("gap_ends", ()))
    near = np.zeros(len(ends), dtype=bool)
    for moment in moments:
        if len(moment) == count:
            begin, end = moment[0] - AROUND_SECONDS[0], moment[-1] + AROUND_SECONDS[1]
            near |= (begin <= ends) & (ends <= end)
    return [load["gaps"][at] for at in np.flatnonzero(near)]


# -- from the last token to the rows -------------------------------------------------------------


def _latency(figures: Figures) -> None:
    lengths = dict.fromkeys(load["name"] for run in figures.runs for load in run.get("latency", ()))
    for length in lengths:
        for beside in (False, True):
            where = f"{length}, {'streams beside' if beside else 'alone'}"
            late: dict[str, float] = {}
            for name in CONFIGURATIONS:
                loads = [
                    one
                    for one in figures.loads(name, "latency")
                    if one["name"] == length and one["beside"] == beside
                ]
                if not loads:
                    continue
                late[name] = statistics.median(load["last_gap"] for load in loads) * MS
                figures.add(f"{name}, {where}: last chunk later than usual", late[name], "ms")
                beyond = late[name] - late["off"] if "off" in late else None
                _deliveries(figures, f"{name}, {where}", loads, beyond)


def _deliveries(figures: Figures, which: str, loads: Sequence[Any], beyond: float | None) -> None:
    """``beyond``: how much later the last chunk comes than it does with routes off, in ms."""
    for place, to, limit in DELIVERIES:
        here = [load for load in loads if load["place"] == place and "delivery" in load]
        if not here:
            continue
        times = [load["delivery"] * MS for load in here]
        p50 = statistics.median(times)
        what = f"{which}: from response to rows in the {to}"
        figures.add(f"{what}, p50", p50, "ms", limit if which.startswith("arena") else None)
        figures.add(f"{what}, max of {len(times)}", max(times), "ms")
        inside = statistics.median(load["in_trainer"] for load in here) * MS
        figures.add(f"{what}, spent in the trainer", inside, "ms")
        if beyond is not None:
            what = f"{which}: from the end of generation to rows in the {to}, p50"
            figures.add(what, p50 + beyond, "ms")


# -- bytes ---------------------------------------------------------------------------------------


def _bytes(figures: Figures) -> None:
    routes: dict[tuple[str, str], int] = {}
    whole: dict[tuple[str, str], int] = {}
    for name in CONFIGURATIONS:
        for load in figures.loads(name, "latency"):
            key = name, load["name"]
            routes[key] = max(routes.get(key, 0), load["route_bytes"])
            whole[key] = load["response_bytes"]
        for load in figures.loads(name, "itl"):
            routes[name, load["name"]] = load["route_bytes"]
        for load in figures.loads(name, "throughput"):
            routes[name, "batch"] = load["route_bytes"]
            whole[name, "batch"] = load["response_bytes"]
    for (name, length), size in sorted(routes.items()):
        what = f"{name}, {length}: response bytes for routes"
        if name == "arena":
            figures.always(what, size, "B", 350)
        elif name == "native":
            figures.add(what, size, "B")
    for (name, length), size in sorted(whole.items()):
        figures.add(f"{name}, {length}: whole response, status line and headers too", size, "B")


def _memory(figures: Figures) -> None:
    for name in CONFIGURATIONS:
        for run in figures.of(name):
            if "memory" in run:
                _memory_of(figures, name, run)
                break  # every start of a configuration reads the same


def _memory_of(figures: Figures, name: str, run: Run) -> None:
    reading = run["memory"]
    scheduler = engine_memory.scheduler(reading)
    for what, process in (("scheduler", scheduler), ("main process", reading["main"])):
        for field_name in ("VmRSS", "Pss", "VmHWM", "RssShmem", "VmLck", "VmPin"):
            if field_name in process:
                value = process[field_name] * MIB
                figures.add(f"{name}, {what}: {field_name}", value, "MiB")
    total = sum(one.get("Pss", 0) for one in (reading["main"], *reading["children"]))
    figures.add(f"{name}, all processes: Pss", total * MIB, "MiB")
    if reading["gpu_used"] is not None:
        figures.add(f"{name}, GPU in use", reading["gpu_used"] * MIB, "MiB")
    if reading["arena"]:
        arena = reading["arena"]
        figures.add("arena, taken in /dev/shm", arena["taken"] * MIB, "MiB")
        figures.add("arena, route table", arena["table"] * MIB, "MiB")
        held = arena["in_use"] / reading["rows_held"]
        model = dimensions(figures.gpu)
        row_bytes = model["num_hidden_layers"] * model["num_experts_per_tok"]  # uint8
        what = f"arena, bytes held a row of {row_bytes}, {reading['rows_held']} rows"
        figures.add(what, held, "B", 1.02 * row_bytes)
    for trace in run.get("trace", ()):
        if trace["block"] == "memory":
            for kind in ("pinned_bytes", "gpu_bytes"):
                for value in trace[kind]:
                    label = "page-locked by torch" if kind == "pinned_bytes" else "GPU, by torch"
                    figures.add(f"{name}, scheduler: {label}", value * MIB, "MiB")


def _counters(figures: Figures) -> None:
    every = [run["counters"] for run in figures.engines("arena") if run.get("counters")]
    if not every:
        return
    total = {name: sum(counters[name] for counters in every) for name in every[0]}
    ended = ("ticketed", "inline", "failed_requests", "no_routes")
    for name in ("finished", *ended, "tags_checked"):
        figures.add(f"arena: {name}", total[name], "")
    locked = max(counters["page_locked_bytes"] for counters in every)
    figures.add("arena: page-locked", locked * MIB, "MiB")
    figures.add("arena: pageable copies", total["pageable_copies"], "")
    figures.always("arena: tags_wrong", total["tags_wrong"], "", 0)
    figures.always("arena: inline_full", total["inline_full"], "", 0)
    figures.always("arena: hook_errors", total["hook_errors"], "", 0)
    astray = abs(total["finished"] - sum(total[name] for name in ended))
    figures.always("arena: finished, less all that became of them", astray, "", 0)


# -- the scheduler thread ------------------------------------------------------------------------


def _hooks(figures: Figures) -> None:
    """Seconds of every decode step, finishes left out."""
    for name in CONFIGURATIONS:
        traces = figures.traces(name, "throughput", "together", "itl", "latency_beside")
        parts = {
            kind: [seconds for trace in traces for seconds in trace[kind]]
            for kind in ("forward_begin", "forward_end", "finalize", "idle_issue", "idle_flush")
        }
        total = sum(statistics.median(seconds) for seconds in parts.values() if seconds)
        if not total:
            continue
        for kind, seconds in parts.items():
            if seconds:
                what = f"{name}, scheduler thread, decode step: {kind} p50"
                figures.add(what, statistics.median(seconds) * US, "us")
        budget = 50 if name == "arena" else None
        figures.add(f"{name}, scheduler thread, decode step: all", total * US, "us", budget)


class _Step(NamedTuple):
    """Seconds of a step in which requests finished; sending pickles the message with all of their
    responses and hands it to ZeroMQ.
    """

    ticketing: float
    flushing: float
    sending: float

    @property
    def all(self) -> float:
        """Everything but the sending, which an engine without routes does, too."""
        return self.ticketing + self.flushing


def _finishes(figures: Figures) -> None:
    """What finished requests cost the scheduler thread, by length and number in one step."""
    alone: dict[tuple[str, str], list[_Step]] = {}
    for name in ROUTED:
        for (count, length), steps in sorted(_steps(figures, name).items()):
            if count == 1:
                alone[name, length] = steps
                _one_finishes(figures, name, length, steps)
            else:
                what = f"{name}, scheduler thread, {count} requests of {length} finish in a step"
                budget = 3 if name == "arena" and count == 160 else None
                figures.add(f"{what}: all of it p50", _p50(steps, "all") * MS, "ms", budget)
                figures.add(f"{what}: send p50", _p50(steps, "sending") * MS, "ms")
    for length in dict.fromkeys(length for _, length in alone):
        if ("native", length) in alone and ("arena", length) in alone:
            _compared(figures, length, alone["native", length], alone["arena", length])


def _one_finishes(figures: Figures, name: str, length: str, steps: Sequence[_Step]) -> None:
    what = f"{name}, scheduler thread, a request of {length} finishes alone"
    arena = name == "arena"
    figures.add(f"{what}: collect + ticket p50", _p50(steps, "ticketing") * US, "us")
    figures.add(f"{what}: all of it p50", _p50(steps, "all") * US, "us", 100 if arena else None)
    p99 = float(np.percentile([step.all for step in steps], 99))
    figures.add(f"{what}: all of it p99 of {len(steps)}", p99 * US, "us", 300 if arena else None)
    figures.add(f"{what}: send p50", _p50(steps, "sending") * US, "us")


def _compared(
    figures: Figures, length: str, native: Sequence[_Step], arena: Sequence[_Step]
) -> None:
    gathered = _p50(native, "all") + _p50(native, "sending")
    taken, sent = _p50(arena, "all"), _p50(arena, "sending")
    what = f"native gather + send / arena, a request of {length}"
    budget = 500 if length == "32K" else None
    figures.add(f"{what}, its send not counted", gathered / taken, "x", budget, "min")
    figures.add(f"{what}, its send counted", gathered / (taken + sent), "x")


def _steps(figures: Figures, name: str) -> dict[tuple[int, str], list[_Step]]:
    """Steps by how many requests finish in them and how long those are."""
    steps: dict[tuple[int, str], list[_Step]] = {}
    for trace in figures.traces(
        name, "itl", "latency", "latency_beside", "throughput", "together", "memory"
    ):
        for count, tokens, *seconds in trace["steps"]:
            if count in STEPS_SHOWN:
                steps.setdefault((count, _length(tokens)), []).append(_Step(*seconds))
    return steps


def _p50(steps: Sequence[_Step], part: str) -> float:
    return statistics.median(getattr(step, part) for step in steps)


def _length(tokens: float) -> str:
    """Classes of lengths: 768 tokens are 1K, 8,350 are 8K."""
    return f"{round(tokens / 1024)}K" if tokens > 700 else "under 700 tokens"
