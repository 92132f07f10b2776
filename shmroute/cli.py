"""The ``shmroute`` command: what arenas there are, how full they are, what dead ones left.

::

    shmroute ls                    one line an arena
    shmroute stat [ARENA]          everything about each
    shmroute gc [ARENA]            remove what dead writers left
    shmroute doctor                is this machine ready?

Looking (``ls``, ``stat``) locks nothing and takes an unreadable segment for a line of its
own. Exit status: 0, or 1 where an arena that was asked for is not there, something could not
be removed, or ``doctor`` found a problem; 2 for a wrong command line.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import inspection, reaper
from .arena import parse_size
from .doctor import NOTE, OK, examine
from .inspection import ArenaReport, SlotUse

try:
    import click
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as missing:
    sys.exit(
        f"the shmroute command needs {missing.name}, which is not installed. "
        "Remedy: pip install '.[cli]' in shmroute's own folder"
    )

# Wide enough for every line when the output goes into a file or a pipe.
_PIPE_WIDTH = 250
_STATE_STYLE = {"live": "green", "starting": "cyan", "dead": "yellow", "unreadable": "red"}
_VERDICT_STYLE = {OK: "green", NOTE: "yellow"}
# The bridge's default; this package does not know the bridge.
_DEFAULT_CAPACITY = "8GiB"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shmroute")
def main() -> None:
    """Look at arenas of expert routes in /dev/shm and clean up after dead ones."""


@main.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_arenas(as_json: bool) -> None:
    """List live and dead arenas, one a line."""
    reports = inspection.inspect_all()
    if as_json:
        _print_json([report.as_json() for report in reports])
    elif reports:
        console = _console()
        console.print(_overview(reports))
        for report in reports:
            if report.problem:
                console.print(f"{report.segment.data}: {_plain(report.problem)}")
    else:
        _console().print("no arenas")


@main.command()
@click.argument("arena", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def stat(arena: str | None, as_json: bool) -> None:
    """Show everything about ARENA (an arena's or a segment's name), or about all."""
    reports = inspection.inspect_all(arena)
    if as_json:
        _print_json([report.as_json() for report in reports])
    if arena is not None and not reports:
        raise click.ClickException(f"no arena {arena!r} here; shmroute ls shows those there are")
    if as_json:
        return
    console = _console()
    for report in reports:
        console.print(_details(report))
        for warning in _warnings(report):
            console.print(f"[yellow]warning:[/] {_plain(warning)}")
        console.print()
    if not reports:
        console.print("no arenas")


@main.command()
@click.argument("arena", required=False)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def gc(arena: str | None, dry_run: bool) -> None:
    """Remove what dead writers left (of ARENA, or of any), unreleased records included.

    An arena whose writer lives, or whose records a reader has open, is kept.
    """
    console, freed, failed = _console(), 0, False
    reports = inspection.inspect_all(arena)
    for report in reports:
        try:
            removed, size, why = _would_remove(report) if dry_run else _remove(report)
        except OSError as error:
            removed, size, why, failed = False, 0, f"it could not be removed: {error}", True
        freed += size
        verb = "kept" if not removed else "would remove" if dry_run else "removed"
        given = f", {_size(size)}" if size else ""
        console.print(f"{verb} {report.segment.data}{given}" + (f": {_plain(why)}" if why else ""))
    done = "would be" if dry_run else "were"
    console.print(f"{_size(freed)} {done} given back" if reports else "no arenas")
    if failed:
        sys.exit(1)


@main.command()
@click.option(
    "--capacity",
    default=_DEFAULT_CAPACITY,
    envvar="SHMROUTE_CAPACITY",
    show_default=True,
    show_envvar=True,
    help="The arena that must fit.",
)
def doctor(capacity: str) -> None:
    """Check that an arena fits here and that SGLang loads the plugin."""
    try:
        findings = examine(parse_size(capacity))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--capacity") from error
    console = _console()
    for finding in findings:
        style = _VERDICT_STYLE.get(finding.verdict, "red")
        line = f"[{style}]{finding.verdict:8}[/]{_plain(finding.what)}: {_plain(finding.found)}"
        console.print(line)
        if finding.remedy:
            console.print(f"        remedy: {_plain(finding.remedy)}")
    if any(finding.verdict not in (OK, NOTE) for finding in findings):
        sys.exit(1)


# -- gc ----------------------------------------------------------------------------------------


def _remove(report: ArenaReport) -> tuple[bool, int, str]:
    """Reap one segment: whether it was removed, bytes given back, why it was kept."""
    if report.segment.uid != os.geteuid():
        return False, 0, f"it is user {report.user}'s"
    outcome = reaper.reap_segment(report.segment, force=True)
    if outcome is not None:
        return not outcome.kept, outcome.freed_bytes, outcome.kept
    now = inspection.inspect(report.segment)
    if now is None:
        return True, 0, "somebody else removed it"
    return False, 0, _alive(now) if now.alive else now.problem or "another process is reaping it"


def _would_remove(report: ArenaReport) -> tuple[bool, int, str]:
    if report.segment.uid != os.geteuid():
        return False, 0, f"it is user {report.user}'s"
    if report.alive:
        return False, 0, _alive(report)
    if report.alive is None:
        return False, 0, report.problem
    if report.use is not None and report.use.leased:
        return False, 0, "a reader has records open"
    return True, report.taken_bytes, ""


def _alive(report: ArenaReport) -> str:
    writer = report.description and report.description.writer
    return f"its writer lives (pid {writer.pid})" if writer else "its writer lives"


# -- output ------------------------------------------------------------------------------------


def _console() -> Console:
    # Names and errors are printed as they are: no emoji, no guessed colours of numbers.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(width=width, emoji=False, highlight=False, soft_wrap=not sys.stdout.isatty())


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


def _plain(text: str) -> str:
    """Text that is shown as it is: what another process wrote moves no cursor, styles nothing."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _overview(reports: Sequence[ArenaReport]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("arena", "id", "state", "user", "pid", "age", "model", "geometry"):
        table.add_column(heading)
    for heading in ("slots", "bytes", "capacity", "inline", "evicted", "incomplete", "failed"):
        table.add_column(heading, justify="right")
    for report in reports:
        table.add_row(*_overview_row(report))
    return table


def _overview_row(report: ArenaReport) -> list[str]:
    style = _STATE_STYLE[report.state]
    start = [report.segment.arena, report.segment.arena_id.hex()[:8]]
    start += [f"[{style}]{report.state}[/]", report.user]
    if report.description is None or report.use is None:
        return start
    counters, use, description = report.counters, report.use, report.description
    return [
        *start,
        str(description.writer.pid),
        _duration(report.age or 0),
        _plain(description.routes.model),
        _geometry(report),
        f"{use.in_use:,}/{use.total:,}",
        _size(use.sealed_bytes),
        _size(description.capacity),
        *(f"{counters[name]:,}" for name in ("inline", "evicted", "incomplete")),
        f"{counters['failed']:,}",
    ]


def _geometry(report: ArenaReport) -> str:
    assert report.description is not None
    routes = report.description.routes
    layers = routes.row_shape[0]
    return f"{layers} layers, top-{routes.top_k} of {routes.num_experts}, {routes.dtype_name}"


def _details(report: ArenaReport) -> Table:
    style = _STATE_STYLE[report.state]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("segment", report.segment.data)
    table.add_row("state", f"[{style}]{report.state}[/]")
    table.add_row("owner", f"{report.user} (uid {report.segment.uid})")
    if report.problem:
        table.add_row("problem", _plain(report.problem))
    table.add_row("memory taken", _size(report.taken_bytes))
    if report.description is not None and report.use is not None:
        for heading, text in _described(report, report.use):
            table.add_row(heading, _plain(text))
    return table


def _described(report: ArenaReport, use: SlotUse) -> list[tuple[str, str]]:
    assert report.description is not None
    description, counters = report.description, report.counters
    writer, routes = description.writer, description.routes
    started = datetime.datetime.fromtimestamp(report.writer_started or 0).astimezone()
    reclaimable = use.sealed - use.unreleased
    return [
        ("writer", f"pid {writer.pid} on {writer.host}, started {started:%Y-%m-%d %H:%M:%S}"),
        ("age", _duration(report.age or 0)),
        ("model", routes.model or "(not named)"),
        ("geometry", f"{_geometry(report)}, {routes.row_bytes} bytes a token"),
        ("capacity", f"{_size(description.capacity)}, {_size(description.heap_bytes)} of it heap"),
        ("bytes in use", f"{_size(use.sealed_bytes)} ({_size(use.unreleased_bytes)} unreleased)"),
        ("slots in use", f"{use.in_use:,} of {use.total:,}"),
        (
            "records now",
            f"{use.sealed:,} sealed ({use.unreleased:,} unreleased, {reclaimable:,} released), "
            f"{use.in_flight:,} in flight, {use.leased:,} leased by readers",
        ),
        (
            "records ever",
            f"{counters['sealed']:,} sealed, {counters['failed']:,} failed, "
            f"{counters['incomplete']:,} incomplete, {counters['released']:,} released and "
            f"reclaimed, {counters['evicted']:,} evicted; "
            f"{counters['kept_by_leases']:,} times kept by a reader's lease",
        ),
        (
            "rows ever",
            f"{counters['rows_sealed']:,} sealed, {counters['rows_missing']:,} of them missing",
        ),
        *_engine(counters),
    ]


def _engine(counters: dict[str, int]) -> list[tuple[str, str]]:
    """The lines of an engine that counts its requests; a plain writer has none."""
    if not any(counters[name] for name in ("finished", "tickets", "inline", "no_routes")):
        return []
    ended = [counters[name] for name in ("ticketed", "inline", "failed_requests", "no_routes")]
    balance = "=" if counters["finished"] == sum(ended) else "!="
    names = ("ticketed", "inline", "failed", "no routes")
    parts = " + ".join(f"{n:,} {name}" for n, name in zip(ended, names, strict=True))
    lines = [
        ("requests", f"{counters['finished']:,} finished {balance} {parts}"),
        (
            "inline because",
            f"arena full {counters['inline_full']:,}, no rows {counters['inline_empty']:,}, "
            f"after a failure {counters['inline_after_failure']:,}",
        ),
        ("hook errors", f"{counters['hook_errors']:,}"),
        ("tags", f"{counters['tags_checked']:,} checked, {counters['tags_wrong']:,} wrong"),
    ]
    if counters["shadow_records"]:
        lines.append(
            (
                "shadow",
                f"{counters['shadow_records']:,} records, {counters['shadow_rows']:,} rows "
                f"compared, {counters['shadow_mismatches']:,} differ, "
                f"{counters['shadow_rows_incomparable']:,} not comparable",
            )
        )
    return lines


def _warnings(report: ArenaReport) -> list[str]:
    found = []
    counters, use = report.counters, report.use
    if counters.get("inline_full"):
        found.append(
            f"{counters['inline_full']:,} records went inline because the arena was full: release "
            "records after training on them (routes.release(), shmroute.release(tickets)), or "
            "start the engine with a larger --shmroute-capacity or more --shmroute-slots"
        )
    if counters.get("shadow_mismatches"):
        found.append(
            f"{counters['shadow_mismatches']:,} rows differ from SGLang's own: the engine's log "
            "names rid, token and layer; do not train on this engine's routes"
        )
    if report.state == inspection.DEAD:
        lost = f" ({use.in_flight:,} of its records unsealed)" if use and use.in_flight else ""
        found.append(f"its writer is dead{lost}: shmroute gc removes it once nobody reads")
    return found


def _size(size: int) -> str:
    if size < 1 << 20:
        return f"{size / (1 << 10):.1f} KiB"
    return f"{size / (1 << 20):,.1f} MiB" if size < 1 << 30 else f"{size / (1 << 30):,.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"


if __name__ == "__main__":
    main()
