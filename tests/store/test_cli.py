"""The ``shmroute`` command on real arenas: written by other processes, dead ones by SIGKILL."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import shmroute
from shmroute import doctor
from shmroute.cli import main
from shmroute.doctor import NOTE, OK
from shmroute.segments import path_of

SHM = Path("/dev/shm")
MODEL = "test/moe-of-[12]-layers"

# Three sealed records of 100 rows, one of them incomplete, one failed, one in flight; and the
# counters of an engine that served one more inline because the arena was full.
WRITER = """
import sys, shmroute
name, slots = sys.argv[1], int(sys.argv[2])
layout = shmroute.RouteLayout(300, 4, range(2, 14), model=sys.argv[3])
arena = shmroute.Arena.create(name, layout, capacity="4MiB", slots=slots)
tickets = []
for index in range(3):
    record = arena.reserve(f"rid-{index}", tokens=100)
    record.rows[...] = index
    record.seal(missing=[(0, 5)] if index == 2 else [])
    tickets.append(record.ticket.hex())
arena.reserve("given-up", tokens=10).fail("the test said so")
arena.reserve("in-flight", tokens=10)
counters = arena.writer.counters
for counter, amount in {"finished": 5, "tickets": 3, "inline": 1, "inline_full": 1,
                        "failed_before_ticket": 1}.items():
    counters.add(counter, amount)
print(*tickets, flush=True)
sys.stdin.read()
"""


class WriterProcess:
    """A process that made an arena and waits; ``kill`` is what an engine's end is."""

    def __init__(self, arena: str, slots: int = 300) -> None:
        self.arena = arena
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, arena, str(slots), MODEL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.tickets = [bytes.fromhex(text) for text in self.process.stdout.readline().split()]
        assert len(self.tickets) == 3

    def kill(self) -> None:
        with self.process:
            self.process.send_signal(signal.SIGKILL)


@pytest.fixture
def arena() -> Iterator[str]:
    """A name of this test's own; whatever it left under it is removed."""
    name = f"cli-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    for path in SHM.glob(f"shmroute-*-{name}-*"):
        path.unlink()


@pytest.fixture
def start_writer(arena: str) -> Iterator[Callable[..., WriterProcess]]:
    started: list[WriterProcess] = []

    def start(**options: Any) -> WriterProcess:
        started.append(WriterProcess(arena, **options))
        return started[-1]

    yield start
    for writer in started:
        writer.kill()


def run(*arguments: str, code: int = 0, **environment: str) -> Result:
    result = CliRunner().invoke(main, arguments, env=environment, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def stat_json(arena: str) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = json.loads(run("stat", arena, "--json").stdout)
    return reports


def line_of(output: str, start: str) -> str:
    """The one line of ``output`` that begins with ``start``, its columns one space apart."""
    (line,) = [line for line in output.splitlines() if line.strip().startswith(start)]
    return " ".join(line.split())


def files_of(arena: str) -> list[str]:
    return sorted(path.name for path in SHM.glob(f"shmroute-*-{arena}-*"))


# -- ls and stat -------------------------------------------------------------------------------


def test_ls_shows_a_live_and_a_dead_arena_on_a_line_each(arena, start_writer):
    dead, live = start_writer(), None
    dead.kill()
    live = start_writer()
    lines = [line.split() for line in run("ls").stdout.splitlines() if arena in line]
    assert sorted(line[2] for line in lines) == ["dead", "live"]
    by_state = {line[2]: line for line in lines}
    assert by_state["live"][4] == str(live.process.pid)
    assert by_state["dead"][4] == str(dead.process.pid)
    assert "12 layers, top-4 of 300, uint16" in " ".join(by_state["live"])
    assert MODEL in by_state["live"]
    assert "4/300" in by_state["live"]


def test_ls_as_json_lists_the_same_arenas(arena, start_writer):
    start_writer()
    (found,) = [one for one in json.loads(run("ls", "--json").stdout) if one["arena"] == arena]
    assert found["state"] == "live"


def test_stat_as_json_has_owner_geometry_use_and_counters(arena, start_writer):
    writer = start_writer()
    (found,) = stat_json(arena)
    assert found["uid"] == os.geteuid()
    assert found["writer"]["pid"] == writer.process.pid
    assert 0 <= found["age_seconds"] < 120
    assert found["geometry"] == {
        "model": MODEL,
        "layer_ids": list(range(2, 14)),
        "moe_layers": 12,
        "num_layers": 14,
        "top_k": 4,
        "num_experts": 300,
        "dtype": "uint16",
        "row_bytes": 96,
    }
    assert found["capacity"] == 4 << 20
    assert found["taken_bytes"] >= 4 << 20
    slots = found["slots"]
    assert (slots["total"], slots["in_use"], slots["sealed"], slots["in_flight"]) == (300, 4, 3, 1)
    assert slots["unreleased"] == 3
    assert 3 * 100 * 96 <= slots["sealed_bytes"] <= 3 * 100 * 96 * 1.1
    counters = found["counters"]
    assert (counters["sealed"], counters["failed"], counters["incomplete"]) == (3, 1, 1)
    assert counters["rows_missing"] == 5


def test_stat_adds_up_what_became_of_the_engine_s_requests(arena, start_writer):
    start_writer()
    output = run("stat", arena).stdout
    assert line_of(output, "requests") == (
        "requests 5 finished = 3 ticketed + 1 inline + 1 failed + 0 no routes"
    )
    assert line_of(output, "records now") == (
        "records now 3 sealed (3 unreleased, 0 released), 1 in flight, 0 leased by readers"
    )
    assert MODEL in line_of(output, "model")


def test_stat_says_what_to_do_when_the_arena_was_full(arena, start_writer):
    start_writer()
    warning = line_of(run("stat", arena).stdout, "warning: 1 records went inline")
    for remedy in ("routes.release()", "--shmroute-capacity", "--shmroute-slots"):
        assert remedy in warning


def test_stat_counts_what_readers_lease_and_what_was_released(arena, start_writer):
    writer = start_writer()
    with shmroute.ShmRouteReader(writer.tickets[0]) as routes:
        view = routes.numpy()
    assert shmroute.release(writer.tickets[1]) == 1
    # The command is another process: a lease of one's own is no lock that collides.
    command = [sys.executable, "-m", "shmroute.cli", "stat", arena, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    slots = json.loads(done.stdout)[0]["slots"]
    assert (slots["sealed"], slots["unreleased"], slots["leased"]) == (3, 2, 1)
    assert slots["unreleased_bytes"] < slots["sealed_bytes"]
    assert not view.any()


def test_looking_takes_no_lock_and_changes_nothing(arena, start_writer):
    writer = start_writer()
    before = stat_json(arena)[0]
    run("ls")
    after = stat_json(arena)[0]
    for changing in ("age_seconds", "writer"):  # a wall-clock time is worked out of two clocks
        del before[changing], after[changing]
    assert before == after
    with shmroute.ShmRouteReader(writer.tickets[1]) as routes:
        assert np.array_equal(routes.numpy(), np.full((100, 12, 4), 1, np.uint16))


def test_stat_of_an_arena_that_is_not_there_fails(arena):
    result = run("stat", arena, code=1)
    assert f"no arena '{arena}'" in result.stderr
    assert "shmroute ls" in result.stderr


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"SHMROUTE" + b"\xff" * 20000])
def test_an_unreadable_segment_is_a_line_of_its_own(arena, content):
    name = f"shmroute-{os.geteuid()}-{arena}-{secrets.token_hex(8)}"
    SHM.joinpath(name).write_bytes(content)
    SHM.joinpath(name + ".ctl").write_bytes(content)
    assert "unreadable" in line_of(run("ls").stdout, arena)
    assert line_of(run("ls").stdout, name + ":")
    (found,) = stat_json(arena)
    assert found["state"] == "unreadable"
    assert found["problem"]
    assert found["slots"] is None
    run("stat", arena)


def test_a_segment_of_another_layout_version_is_listed_with_the_remedy(arena, start_writer):
    start_writer().kill()
    (name,) = [name for name in files_of(arena) if "." not in name]
    with SHM.joinpath(name).open("r+b") as segment:
        segment.seek(8)
        segment.write((99).to_bytes(4, "little"))
    assert "same shmroute release" in stat_json(arena)[0]["problem"]


def test_a_segment_that_another_user_could_have_planted_is_listed_and_kept(arena):
    foreign = f"shmroute-{os.geteuid() + 1}-{arena}-{secrets.token_hex(8)}"
    SHM.joinpath(foreign).write_bytes(b"\0" * 100)
    assert stat_json(arena)[0]["state"] == "unreadable"
    assert line_of(run("gc", arena).stdout, f"kept {foreign}")
    assert SHM.joinpath(foreign).exists()


# -- gc ----------------------------------------------------------------------------------------


def test_gc_removes_what_a_killed_writer_left_and_says_how_much(arena, start_writer):
    start_writer(slots=600).kill()
    assert len(files_of(arena)) == 5  # data, control, three lease files
    output = run("gc", arena).stdout
    assert "4.0 MiB" in line_of(output, "removed shmroute-")
    assert "4.0 MiB were given back" in output
    assert files_of(arena) == []


def test_gc_keeps_an_arena_whose_writer_lives(arena, start_writer):
    writer = start_writer()
    before = files_of(arena)
    kept = line_of(run("gc", arena).stdout, "kept shmroute-")
    assert f"its writer lives (pid {writer.process.pid})" in kept
    assert files_of(arena) == before


def test_gc_keeps_a_dead_arena_that_a_reader_has_open(arena, start_writer):
    writer = start_writer()
    with shmroute.ShmRouteReader(writer.tickets[1]) as routes:
        view = routes.numpy()
    writer.kill()
    assert "a reader has records open" in line_of(run("gc", arena).stdout, "kept shmroute-")
    assert (view == 1).all()
    del view, routes
    assert line_of(run("gc", arena).stdout, "removed shmroute-")
    assert files_of(arena) == []


def test_gc_dry_run_says_what_gc_would_do_and_does_nothing(arena, start_writer):
    start_writer()
    start_writer().kill()
    before = files_of(arena)
    output = run("gc", arena, "--dry-run").stdout
    assert "4.0 MiB" in line_of(output, "would remove shmroute-")
    assert "its writer lives" in line_of(output, "kept shmroute-")
    assert files_of(arena) == before


def test_gc_removes_a_segment_that_nobody_can_read(arena):
    name = f"shmroute-{os.geteuid()}-{arena}-{secrets.token_hex(8)}"
    SHM.joinpath(name).write_bytes(b"\0" * 100)
    assert line_of(run("gc", arena).stdout, f"removed {name}")
    assert files_of(arena) == []


def test_gc_removes_an_arena_whose_creator_died_half_way(arena):
    name = f"shmroute-{os.geteuid()}-{arena}-{secrets.token_hex(8)}.tmp"
    SHM.joinpath(name).write_bytes(b"\0" * 100)
    assert stat_json(arena)[0]["state"] == "dead"
    assert line_of(run("gc", arena).stdout, f"removed {name}")


def test_gc_with_nothing_to_remove_is_no_failure(arena):
    assert "no arenas" in run("gc", arena).stdout


def test_one_segment_of_several_can_be_named(arena, start_writer):
    for _ in range(2):
        start_writer().kill()
    first, second = [name for name in files_of(arena) if "." not in name]
    run("gc", first)
    assert not SHM.joinpath(first).exists()
    assert path_of(second) == str(SHM / second)
    assert SHM.joinpath(second).exists()


# -- doctor ------------------------------------------------------------------------------------


def test_doctor_finds_memory_boot_id_and_plugin():
    output = run("doctor", "--capacity", "1MiB", SGLANG_PLUGINS="").stdout
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert line_of(output, "ok      boot id") == f"ok boot id: {boot_id}"
    for what in ("the size of /dev/shm", "the machine's memory", "locked memory"):
        assert line_of(output, f"ok      {what}")


def test_doctor_fails_where_the_arena_does_not_fit():
    result = run("doctor", "--capacity", "100TiB", code=1)
    assert "does not fit" in line_of(result.stdout, "problem the size of /dev/shm")
    assert "--shm-size" in result.stdout


def test_doctor_takes_the_capacity_that_the_engine_would():
    run("doctor", code=1, SHMROUTE_CAPACITY="100TiB")


@pytest.mark.parametrize("capacity", ["8 apples", "-1GiB"])
def test_doctor_refuses_a_capacity_that_is_none(capacity):
    run("doctor", f"--capacity={capacity}", code=2)


needs_sglang = pytest.mark.skipif(
    # Not importorskip: importing it here would choose its platform for the whole run.
    importlib.util.find_spec("sglang") is None,
    reason="sglang is not installed",
)


@needs_sglang
@pytest.mark.parametrize("whitelist", ["other", "other, another", ","])
def test_doctor_sees_that_a_whitelist_leaves_the_plugin_out(whitelist):
    result = run("doctor", "--capacity=1MiB", code=1, SGLANG_PLUGINS=whitelist)
    assert "left out" in line_of(result.stdout, "problem plugin")
    assert "shmroute" in line_of(result.stdout, "remedy: SGLANG_PLUGINS=")


@needs_sglang
def test_doctor_accepts_a_whitelist_with_the_plugin():
    output = run("doctor", "--capacity=1MiB", SGLANG_PLUGINS="other, shmroute").stdout
    assert line_of(output, "ok      plugin")


@pytest.mark.parametrize(
    ("version", "on_gpu", "verdict"),
    [("0.5.17", True, OK), ("0.5.23", True, NOTE), ("0.5.23", False, OK), ("9.0", False, NOTE)],
)
def test_doctor_notes_a_version_that_is_not_the_one_tested_on_a_gpu(
    monkeypatch, tmp_path, version, on_gpu, verdict
):
    monkeypatch.setattr(doctor, "_sglang_version", lambda: version)
    monkeypatch.setattr(doctor, "_GPU_DEVICE", tmp_path if on_gpu else tmp_path / "none")
    found = next(finding for finding in doctor.examine(1 << 20) if finding.what == "sglang")
    assert (found.verdict, version in found.found) == (verdict, True)
    assert bool(found.remedy) == (verdict == NOTE)


# -- the command itself --------------------------------------------------------------------------


def test_importing_shmroute_imports_neither_click_nor_rich():
    code = "import sys, shmroute; print({'click', 'rich', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_click_the_command_says_how_to_install_it():
    code = "import sys; sys.modules['click'] = None; import shmroute.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install '.[cli]' in shmroute's own folder" in done.stderr


def test_an_unknown_command_is_a_usage_error():
    run("lst", code=2)
