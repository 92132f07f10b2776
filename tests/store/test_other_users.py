"""Other users of the node: they can put any file of their own under /dev/shm, at any moment."""

from __future__ import annotations

import os
import secrets
import subprocess
from pathlib import Path

import pytest

from shmroute import ArenaNotFound, ShmRouteReader
from shmroute.segments import SHM_DIR

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it acts as several users")

ENGINE, STRANGER, GROUP = 65534, 65533, 12345
AS_ENGINE = f"""
import logging
os.setgroups([]); os.setgid({ENGINE}); os.setuid({ENGINE})
warnings, handler = [], logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("shmroute").addHandler(handler)
"""


@pytest.fixture
def put(request):
    """Put a file, or a folder, of the stranger's under /dev/shm; taken away after the test."""
    made = []

    def put(name, kind="file"):
        made.append(Path(SHM_DIR) / name)
        if kind == "folder":
            made[-1].mkdir(0o700)
        else:
            made[-1].touch(0o600)
        os.chown(made[-1], STRANGER, STRANGER)
        return made[-1]

    yield put
    for path in made:
        path.rmdir() if path.is_dir() else path.unlink()


# -- names that are taken ------------------------------------------------------------------------

CREATOR = (
    AS_ENGINE
    + """
from shmroute import segments
take_memory, taken = segments.take_memory, []
def take_memory_and_wait(*arguments):
    take_memory(*arguments)
    taken.append(arguments)
    if len(taken) == 1:  # of the data segment: its name can be read off by now
        say()
        hear()
segments.take_memory = take_memory_and_wait
try:
    Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16)
except ShmRouteError as error:
    say(error=str(error))
with Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16) as arena:
    say(made_in_the_end=True, warnings=warnings)
"""
)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("suffix", [".ctl", ".L000", ""])
def test_a_name_that_a_stranger_took_is_named_and_nothing_else_is_left(
    actor, files, put, suffix, kind
):
    creator = actor(CREATOR)
    creator.hear()
    (half,) = files()
    squatted = put(half.name.removesuffix(".tmp") + suffix, kind)
    creator.say()
    assert f"{squatted} was made by user {STRANGER} while this arena was" in creator.hear()["error"]
    said = creator.hear()
    assert said["made_in_the_end"]
    if suffix:
        assert f"left alone: {squatted}, made by user {STRANGER}" in said["warnings"]
    creator.wait()
    assert files() == [squatted]


def test_a_dev_shm_that_the_user_may_not_write_is_named_with_the_remedy(actor):
    mount = "mount -t tmpfs -o size=8m,mode=755 tmpfs /dev/shm"
    prefix = ("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh")
    allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"no mount namespace here: {allowed.stderr.decode().strip()}")
    creator = actor(
        AS_ENGINE
        + """
try:
    Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16)
except ShmRouteError as error:
    say(error=str(error))
""",
        prefix=prefix,
    )
    assert f"user {ENGINE} may make no file in /dev/shm" in creator.hear()["error"]


# -- what lies beside ------------------------------------------------------------------------------


def test_what_a_stranger_puts_beside_an_arena_does_not_keep_it(actor, files, put):
    writer = actor(
        AS_ENGINE
        + """
arena = Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16)
shmroute.release(add(arena, "r").ticket)
say(base=arena.segment.base)
hear()
arena.close()
say(warnings=warnings)
"""
    )
    base = writer.hear()["base"]
    beside = {put(f"{base}.L999"), put(f"{base}.L001", "folder"), put(f"{base}.Lock", "folder")}
    writer.say()
    told = writer.hear()["warnings"]
    assert set(files()) == beside
    looked_at = {path for path in beside if path.suffix != ".Lock"}
    assert set(told) == {f"left alone: {path}, made by user {STRANGER}" for path in looked_at}


def test_files_of_strangers_do_not_stop_the_reaper(actor, name, files, put):
    """Their names say that they are the engine's, and it may not open them."""
    base = f"shmroute-{ENGINE}-{name}"
    strange = {put(f"{base}-{secrets.token_hex(8)}") for _ in range(8)}
    strange |= {put(f"{base}-{secrets.token_hex(8)}.tmp") for _ in range(8)}
    strange |= {put(f"{base}-{secrets.token_hex(8)}", "folder") for _ in range(4)}
    dead = actor(AS_ENGINE + 'Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16)\ndie()')
    dead.wait()
    reaper = actor(
        AS_ENGINE + "say(kept=[o.kept for o in shmroute.reap(NAME)], warnings=len(warnings))"
    )
    assert reaper.hear() == {"kept": [""], "warnings": len(strange)}
    assert set(files()) == strange


# -- segments of others ----------------------------------------------------------------------------

STRANGE_WRITER = f"""
import base64
os.setgroups([{GROUP}]); os.setgid({STRANGER}); os.setuid({STRANGER})
arena = Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16, group=SHARED)
say(ticket=base64.b64encode(add(arena, "r").ticket).decode())
hear()
"""


def test_a_stranger_s_segment_is_not_opened_because_a_ticket_names_it(actor):
    """Root could, and would die of it as soon as the stranger makes the file shorter."""
    writer = actor(STRANGE_WRITER, SHARED=None)
    with pytest.raises(ArenaNotFound, match="may not be opened by user 0: read as user 65533"):
        ShmRouteReader(writer.hear()["ticket"])


def test_a_segment_that_is_shared_with_a_group_is_opened_by_its_members_only(actor):
    ticket = actor(STRANGE_WRITER, SHARED=GROUP).hear()["ticket"]
    with pytest.raises(ArenaNotFound, match="or give the arena a group that both belong to"):
        ShmRouteReader(ticket)
    member = actor(
        f"""
        os.setgroups([{GROUP}]); os.setgid({ENGINE}); os.setuid({ENGINE})
        with ShmRouteReader(TICKET) as routes:
            say(intact=is_intact(routes))
        """,
        TICKET=ticket,
    )
    assert member.hear() == {"intact": True}


def test_a_lease_file_that_may_not_be_opened_is_lease_unavailable(actor, files):
    ticket = actor(STRANGE_WRITER, SHARED=GROUP).hear()["ticket"]
    (lease_file,) = [path for path in files() if path.suffix == ".L000"]
    lease_file.chmod(0o600)
    member = actor(
        f"""
        os.setgroups([{GROUP}]); os.setgid({ENGINE}); os.setuid({ENGINE})
        try:
            ShmRouteReader(TICKET)
        except LeaseUnavailable as error:
            say(error=str(error))
        """,
        TICKET=ticket,
    )
    said = member.hear()["error"]
    assert f"user {ENGINE} may not open its lease file: read as user {STRANGER}" in said


# -- modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("umask", [0o000, 0o027, 0o777], ids=oct)
def test_no_file_is_open_to_others_at_any_moment(actor, umask, group):
    """Each is seen when it was just made, and again when it has its mode."""
    creator = actor(
        """
        import stat
        os.umask(UMASK)
        fchmod, fchown, seen = os.fchmod, os.fchown, []
        def look(fd):
            status = os.fstat(fd)
            seen.append((stat.S_IMODE(status.st_mode), status.st_gid == GROUP))
        def fchmod_and_look(fd, mode):
            look(fd)
            fchmod(fd, mode)
            look(fd)
        os.fchmod = fchmod_and_look
        Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16, group=GROUP).close()
        say(seen=seen)
        """,
        UMASK=umask,
        GROUP=group,
    )
    made, final = (creator_seen := creator.hear()["seen"])[::2], creator_seen[1::2]
    assert {mode & ~0o600 for mode, _ in made} == {0}
    shared = [[0o640, True], [0o660, True], [0o640, True]]
    assert final == (shared if group else [[0o600, False]] * 3)
