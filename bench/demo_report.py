"""The demo's figures: one table for people, the same rows for the result file, one verdict.

A row of routes is one token's choice of experts in every MoE layer. Rows are counted as
equal only where they were compared: by the engine itself in shadow mode (with the host cache
that SGLang fills in the same forwards), and in the trainer process with what a separate,
plain SGLang server answered. A request to which that server gave another answer has other
tokens, so its rows are not comparable: it is counted as such and not as equal.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import r3_report
from r3_metrics import Comparison
from result_file import Row
from rich import box
from rich.table import Table

TICKET_BYTES = 350  # budget: what routes may add to a response
ROOM = 1.02  # budget: host bytes per row held, as a multiple of its ids


@dataclass(frozen=True, slots=True)
class Delivery:
    """One request's routes on their way into the trainer.

    ``seconds`` run from the moment the client has the whole response until the trainer
    process has the rows as an array. ``equal`` counts rows that equal the native path's
    (native deliveries only).
    """

    rid: str
    rows: int
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int
    response_bytes: int
    route_bytes: int
    seconds: float
    open_seconds: float
    output_ids: tuple[int, ...]
    equal: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run of the demo measured.

    Attributes
    ----------
    at_once, alone
        Deliveries through the arena: of the concurrent requests, and of those sent one at a
        time.
    native
        The requests of ``alone`` again, on a plain SGLang server.
    faulty_rows
        Rows with an id that is no expert, or with one twice in a layer.
    shadow_rows, shadow_equal
        Rows that the engine compared with SGLang's host cache, and those found equal.
    held_rows, held_bytes
        Rows of the concurrent requests while all were held, and what the arena's heap took.
    capacity, native_table_bytes
        Host memory that the arena took, and that SGLang's host cache takes on each rank.
    experts_used, expert_pairs
        Of all (layer, expert) pairs, those that some row chose.
    left_in_shm
        Files of the demo in /dev/shm after its end.
    replay
        A trainer's routing and policy, without and with replay of the engine's routes.
    """

    layers: int
    num_experts: int
    top_k: int
    at_once: Sequence[Delivery]
    alone: Sequence[Delivery]
    native: Sequence[Delivery]
    faulty_rows: int
    shadow_rows: int
    shadow_equal: int
    held_rows: int
    held_bytes: int
    capacity: int
    native_table_bytes: int
    experts_used: int
    expert_pairs: int
    largest_ticket: int
    left_in_shm: int
    replay: Comparison
    where: str

    @property
    def model(self) -> str:
        return (
            f"a random MoE with {self.layers} layers, top-{self.top_k} of "
            f"{self.num_experts} experts, {self.where}"
        )

    @property
    def through_arena(self) -> list[Delivery]:
        return [*self.at_once, *self.alone]

    @property
    def rows_read(self) -> int:
        return sum(each.rows for each in self.through_arena)

    @property
    def rows_expected(self) -> int:
        """A finished request has a row for each of its tokens but the last sampled one."""
        return sum(each.prompt_tokens + each.new_tokens - 1 for each in self.through_arena)

    @property
    def comparable(self) -> list[Delivery]:
        """Native deliveries whose request got the same answer from both servers."""
        answers = {each.rid: each.output_ids for each in self.alone}
        return [each for each in self.native if each.output_ids == answers[each.rid]]

    @property
    def compared(self) -> int:
        return sum(each.rows for each in self.comparable)

    @property
    def equal(self) -> int:
        return sum(each.equal for each in self.comparable)

    @property
    def native_row_bytes(self) -> int:
        return self.layers * self.top_k * 4

    @property
    def held_row_bytes(self) -> float:
        return self.held_bytes / self.held_rows


def result_rows(figures: Figures) -> list[Row]:
    """The figures in the result file's form; those that are promises carry a budget."""
    alone, native = figures.alone, figures.native
    ids = figures.layers * figures.top_k * (1 if figures.num_experts <= 256 else 2)
    return [
        Row("requests through the arena", len(figures.through_arena), "requests"),
        Row("requests of conversations held in parallel", len(figures.at_once), "requests"),
        Row("tokens, prompts and answers", _tokens(figures), "tokens"),
        Row("prompt tokens out of the prefix cache", _cached(figures), "tokens"),
        Row("rows read by rid in the trainer", figures.rows_read, "rows"),
        _share("rows read, of those expected", figures.rows_read, figures.rows_expected),
        Row("faulty rows", figures.faulty_rows, "rows", 0, "max"),
        _share("rows compared in shadow mode", figures.shadow_rows, figures.rows_expected),
        _share("rows equal to the native path, shadow", figures.shadow_equal, figures.shadow_rows),
        Row("rows compared with a plain server", figures.compared, "rows", 1, "min"),
        _share("rows equal to the native path, plain server", figures.equal, figures.compared),
        Row("requests not comparable", len(native) - len(figures.comparable), "requests"),
        Row("expert and layer pairs used", figures.experts_used, "pairs"),
        Row("response bytes, tickets", _sum(alone, "response_bytes"), "B"),
        Row("response bytes, native", _sum(native, "response_bytes"), "B"),
        Row(
            "routes in a response, largest ticket", figures.largest_ticket, "B", TICKET_BYTES, "max"
        ),
        Row("routes in a response, largest native", _largest(native), "B"),
        Row("response to rows in the trainer p50", _ms(alone), "ms"),
        Row("response to rows in the trainer p50, native", _ms(native), "ms"),
        Row("response to rows p50, longest quarter", _ms(_longest_quarter(alone)), "ms"),
        Row("response to rows p50, longest quarter, native", _ms(_longest_quarter(native)), "ms"),
        Row("open by rid in the trainer p50", _open_us(alone), "us"),
        Row("host bytes per row held", figures.held_row_bytes, "B", ROOM * ids, "max"),
        Row("host bytes per row held, native", figures.native_row_bytes, "B"),
        Row("host bytes taken at start", figures.capacity, "B"),
        Row("host bytes taken at start, native, each rank", figures.native_table_bytes, "B"),
        Row("files left in /dev/shm", figures.left_in_shm, "files", 0, "max"),
        *r3_report.result_rows([figures.replay]),
    ]


def table(figures: Figures) -> Table:
    """The one table that the demo prints."""
    alone, native = figures.alone, figures.native
    shown = Table(
        box=box.SIMPLE_HEAD,
        title=f"Expert routes of {figures.model}",
        title_justify="left",
        pad_edge=False,
    )
    shown.add_column("")
    for heading in ("shmroute", "SGLang native"):
        shown.add_column(heading, justify="right")
    shown.add_column("")
    add = shown.add_row
    add(
        "requests",
        f"{len(figures.through_arena)}",
        f"{len(native)}",
        f"{len(figures.at_once)} in parallel chats, {len(alone)} alone",
    )
    add(
        "tokens",
        f"{_tokens(figures):,}",
        f"{sum(each.prompt_tokens + each.new_tokens for each in native):,}",
        f"{_cached(figures):,} from the prefix cache",
    )
    add(
        "rows read by rid and checked",
        _of(figures.rows_read - figures.faulty_rows, figures.rows_expected),
        "",
        "row: a token's experts, all layers",
        end_section=True,
    )
    add(
        "rows equal to the native path",
        _percent(figures.shadow_equal, figures.shadow_rows),
        "",
        f"{figures.shadow_rows:,} rows, SGLang's host cache",
    )
    add(
        "",
        _percent(figures.equal, figures.compared),
        "",
        f"{figures.compared:,} rows, a plain server",
    )
    others = len(native) - len(figures.comparable)
    if others:
        add("requests not comparable", f"{others}", "", "the servers gave other answers")
    used = _of(figures.experts_used, figures.expert_pairs)
    add("experts used, in all layers", used, "", "", end_section=True)
    small, large = _sum(alone, "response_bytes"), _sum(native, "response_bytes")
    add("response bytes, same requests", f"{small:,}", f"{large:,}", _times(large, small))
    ours, theirs = _ms(alone), _ms(native)
    add(
        "response to rows in trainer, median",
        f"{ours:.2f} ms",
        f"{theirs:.2f} ms",
        _times(theirs, ours),
    )
    long = _longest_quarter(alone)
    ours, theirs = _ms(long), _ms(_longest_quarter(native))
    add(
        f"    the longest {len(long)} ({long[-1].rows:,} to {long[0].rows:,} rows)",
        f"{ours:.2f} ms",
        f"{theirs:.2f} ms",
        _times(theirs, ours),
    )
    add("    of which opening by rid", f"{_open_us(alone) / 1e3:.2f} ms", "", "")
    ours, theirs = figures.held_row_bytes, float(figures.native_row_bytes)
    add("host bytes for each row held", f"{ours:.1f}", f"{theirs:.0f}", _times(theirs, ours))
    add(
        "host memory taken at start",
        f"{figures.capacity / 2**20:.0f} MiB",
        f"{figures.native_table_bytes / 2**20:.0f} MiB",
        "one a node / one a rank",
        end_section=True,
    )
    add("files left in /dev/shm", f"{figures.left_in_shm}", "", "")
    return shown


def closing(figures: Figures, ok: bool) -> str:
    """What was shown, in plain words."""
    if not ok:
        return (
            "NOT shown: a promise was not kept (the rows with 'ok': false in the result file). "
            "Please report it with that file."
        )
    return (
        f"Shown: a real SGLang server {figures.where} answered {len(figures.through_arena)} "
        f"requests with tickets of at most {figures.largest_ticket} bytes; another process, "
        f"told only the request ids, read all {figures.rows_read:,} rows of expert routes from "
        "shared memory. Every row equals what SGLang itself recorded in the same forward, and "
        f"all {figures.compared:,} rows of the requests that were sent one by one equal what a "
        "separate SGLang server without shmroute returned for them, bit for bit.\n"
        f"{r3_report.closing([figures.replay])}"
    )


def _tokens(figures: Figures) -> int:
    return sum(each.prompt_tokens + each.new_tokens for each in figures.through_arena)


def _cached(figures: Figures) -> int:
    return _sum(figures.through_arena, "cached_tokens")


def _sum(deliveries: Sequence[Delivery], field: str) -> int:
    return sum(getattr(each, field) for each in deliveries)


def _largest(deliveries: Sequence[Delivery]) -> int:
    return max(each.route_bytes for each in deliveries)


def _longest_quarter(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """The longest first; a single one would be at the mercy of what else the machine does."""
    return sorted(deliveries, key=lambda each: -each.rows)[: max(1, len(deliveries) // 4)]


def _ms(deliveries: Sequence[Delivery]) -> float:
    return statistics.median(each.seconds for each in deliveries) * 1e3


def _open_us(deliveries: Sequence[Delivery]) -> float:
    return statistics.median(each.open_seconds for each in deliveries) * 1e6


def _share(name: str, part: int, whole: int) -> Row:
    return Row(name, 100 * part / whole if whole else 0.0, "%", 100, "min")


def _percent(part: int, whole: int) -> str:
    """Never rounded up to 100."""
    if part == whole:
        return "100%" if whole else "none"
    return f"{int(10000 * part / whole) / 100:.2f}%"


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}"


def _times(large: float, small: float) -> str:
    return f"{large / small:.1f}x less" if large >= small else f"{small / large:.1f}x more"
