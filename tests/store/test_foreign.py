"""Files and records that somebody else made: not taken over, not believed, not followed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from actors import add

from shmroute import LayoutMismatch, ShmRouteError, ShmRouteReader, layout, segments
from shmroute.attached import attach_all


def test_an_object_that_is_there_already_is_not_taken_over(name):
    squatted = Path(segments.path_of(f"{name}-squatted"))
    squatted.write_bytes(b"somebody else's")
    try:
        with pytest.raises(ShmRouteError, match=r"made by user \d+ while this arena was"):
            segments.create_object(squatted.name, 0o600, None)
        assert squatted.read_bytes() == b"somebody else's"
    finally:
        squatted.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_search_does_not_believe_what_another_user_put_there(arena, files):
    """Anybody may name a file so, and anybody's answer to a rid would be taken for the engine's."""
    add(arena, "r")
    planted = [
        Path(shutil.copy(path, str(path).replace("shmroute-0-", "shmroute-65534-")))
        for path in files()
    ]
    try:
        for path in planted:
            os.chown(path, 65534, 65534)
            path.chmod(0o644)
        assert [attached.segment.uid for attached in attach_all(arena.name)] == [0]
    finally:
        for path in planted:
            path.unlink()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"tokens": 1 << 30},
        {"extent_offset": 1},
        {"extent_offset": 1 << 40},
        {"extent_bytes": 1 << 40},
        {"metadata_offset": 0},
        {"metadata_offset": 1 << 40},
        {"metadata_bytes": 1 << 20},
        {"missing_rows": 21},
    ],
    ids=str,
)
def test_a_record_that_points_outside_its_extent_is_not_followed(arena, change):
    record = add(arena, "r", tokens=20)
    memory = arena.memory
    row = memory.row(record.slot)._replace(**change)
    layout.write_record(memory.data, memory.slot_offset(record.slot), row)
    for source in (record.ticket, "r"):
        with pytest.raises(LayoutMismatch, match="points outside its extent"):
            ShmRouteReader(source, arena=arena.name, timeout=0)
