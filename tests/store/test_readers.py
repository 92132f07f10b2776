"""Many readers at once, of several Python versions, and importing without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from actors import add, pattern

READERS = Path(__file__).parents[2] / ".venv" / "readers.json"
NEEDED = "import numpy, posix_ipc, msgpack"


@pytest.fixture(params=["3.10", "3.11", "3.12", "3.13"])
def other_python(request):
    """The interpreter of a Python version that can run a trainer."""
    known = json.loads(READERS.read_text()) if READERS.exists() else {}
    python = known.get(request.param) or shutil.which(f"python{request.param}")
    if request.param == f"3.{sys.version_info.minor}":
        python = sys.executable
    if python is None:
        pytest.skip(f"no python{request.param} here")
    if subprocess.run([python, "-c", NEEDED], capture_output=True, check=False).returncode:
        pytest.skip(f"python{request.param} cannot: {NEEDED}")
    return python


def test_another_python_version_reads_by_rid_and_ticket(arena, reader, text, other_python):
    record = add(arena, "r")
    other = reader(python=other_python)
    for source in ("r", text(record.ticket), {"routed_experts": text(record.ticket)}):
        other.say(source)
        assert other.hear() == {"intact": True, "error": ""}


def test_another_python_version_releases(arena, actor, text, other_python):
    record = add(arena, "r")
    other = actor(
        "say(released=shmroute.release(TICKET))", python=other_python, TICKET=text(record.ticket)
    )
    assert other.hear() == {"released": 1}
    other.wait()
    assert arena.writer.reclaim() == 1


def test_many_readers_at_once_see_the_same_rows(arena, reader):
    for index in range(8):
        add(arena, f"rid-{index}", tokens=40)
    readers = [reader() for _ in range(4)]
    for index in range(8):
        for one in readers:
            one.say(f"rid-{index}")
    for one in readers:
        assert [one.hear() for _ in range(8)] == [{"intact": True, "error": ""}] * 8


def test_a_reader_waits_for_a_record_that_is_being_written(arena, reader, text):
    record = arena.reserve("r", tokens=20)
    by_rid, by_ticket = reader(), reader()
    by_rid.say("r")
    by_ticket.say(text(record.ticket))
    record.rows[...] = pattern("r", record.generation, 20)
    record.seal()
    assert by_rid.hear()["intact"]
    assert by_ticket.hear()["intact"]


def test_importing_shmroute_imports_no_torch():
    code = "import sys, shmroute, shmroute.reaper; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "False\n"
