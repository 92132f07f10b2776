"""Make ``.venv`` for this clone, quickly when a fitting environment exists.

Problem: SGLang's lock is 11 GB and takes minutes to install, too much to pay
for every clone. Two builds may also start at once, and a build that was killed
must not be taken for a finished one.

Approach: the third-party packages live in a cache folder named by a hash of
what decides its content (requirement files, interpreter, machine). A marker is
written last; a folder without it, or whose installed versions differ from the
lock, is built again from nothing, under a file lock. The clone's ``.venv`` is a
real but thin virtual environment: ``.pth`` lines add the cached packages
(their entry points included), and the clone's own distributions are installed
into it editable. The trainers that tests run against are a folder of their own, laid
over SGLang's; miles, which carries parts of Megatron and of SGLang under their names, is one
more, which only its tests' child processes use (``.venv/miles``). Other Pythons found on the
machine get a small cached environment each, for tests that read an arena from them;
``.venv/readers.json`` lists them.

Run it with any Python from 3.8: it looks for the 3.11 that SGLang's lock needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
ENGINE_PYTHON = "3.11"
READER_PYTHONS = ("3.10", "3.12", "3.13")
ENGINE_LOCK = (ROOT / "requirements/engine.txt", ROOT / "requirements/dev.txt")
TRAINERS_LOCK = (ROOT / "requirements/trainers.txt",)
MILES_LOCK = (ROOT / "requirements/miles.txt",)
READER_LOCK = (ROOT / "requirements/reader.txt",)
DISTRIBUTIONS = (ROOT, ROOT / "sglang_bridge/cpu_platform")
MARKER = ".complete"
ENGINE_GIB = 14

# Runs inside the environment that is checked: lines of "name==version" on stdin.
CHECK = """
import importlib.metadata, importlib.util, sys
wrong = []
for line in sys.stdin.read().split():
    name, _, version = line.partition("==")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "nothing"
    if found != version:
        wrong.append(f"{name}: {found} instead of {version}")
sys.exit("; ".join(wrong) or 0)
"""


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


def cache_folder() -> Path:
    return Path(os.environ.get("SHMROUTE_CACHE") or Path.home() / ".cache/shmroute").absolute()


def describe(python: str) -> str | None:
    """``<executable> <version>`` of an interpreter that really runs, else None."""
    code = "import sys, platform; print(sys.executable, platform.python_version())"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_python(minor: str) -> tuple[str, str] | None:
    """Executable and full version of Python ``minor``, from PATH or from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    in_pyenv = sorted(pyenv.glob(f"versions/{minor}.*/bin/python{minor}"), reverse=True)
    for candidate in (f"python{minor}", "python3", *map(str, in_pyenv)):
        executable, _, version = (describe(candidate) or "").rpartition(" ")
        if version.startswith(f"{minor}."):
            return executable, version
    return None


def digest(files: tuple[Path, ...], *facts: str) -> str:
    """Twelve hex digits that change with any of the files or facts."""
    state = hashlib.sha256("\0".join(facts).encode())
    for file in files:
        state.update(b"\0" + file.read_bytes())
    return state.hexdigest()[:12]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` exclusively; say so when another build has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up is running, waiting for it ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], what: str, quiet: bool = False) -> None:
    """Run ``command``; a quiet one shows its output only in the error."""
    output: dict[str, Any] = (
        {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, text=True, check=False, **output)
    if done.returncode != 0:
        shown = f"{what} failed (exit {done.returncode}): {' '.join(command)}"
        raise SetupError(f"{shown}\n{done.stdout or ''}".rstrip())


def site_packages(venv: Path) -> Path:
    found = sorted(venv.glob("lib/python3.*/site-packages"))
    if not found:
        raise SetupError(f"{venv} has no site-packages folder")
    return found[0]


def pins(files: tuple[Path, ...]) -> list[str]:
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if "==" in line and not line.startswith("#")]


def problem(environment: Path, files: tuple[Path, ...]) -> str | None:
    """Why this cached environment cannot be used, or None."""
    if not (environment / MARKER).exists():
        return "it was never finished" if environment.exists() else "it does not exist yet"
    done = subprocess.run(
        [str(environment / "bin/python"), "-c", CHECK],
        input="\n".join(pins(files)),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip()[-300:] or "its Python does not run" if done.returncode else None


def pip_of(python: str, venv: Path) -> list[str]:
    """A pip for ``venv``: its own, or that of ``python`` where ensurepip is split off."""
    inside = [str(venv / "bin/python"), "-m"]
    if subprocess.run([*inside, "ensurepip"], capture_output=True, check=False).returncode == 0:
        return [*inside, "pip"]
    return [python, "-m", "pip", "--python", str(venv / "bin/python")]


def lay_over(venv: Path, *environments: Path) -> None:
    """Make the packages of ``environments`` importable in ``venv``, behind its own."""
    # addsitedir, not a bare path: the cached packages have .pth files of their own.
    lines = [
        f"import site; site.addsitedir({str(site_packages(below))!r})\n" for below in environments
    ]
    (site_packages(venv) / "shmroute_environment.pth").write_text("".join(lines))


def build(
    environment: Path, python: str, files: tuple[Path, ...], over: tuple[Path, ...] = ()
) -> None:
    """Install ``files`` into a new environment over others; the marker comes last."""
    shutil.rmtree(environment, ignore_errors=True)
    started = time.monotonic()
    run([python, "-m", "venv", "--without-pip", str(environment)], "making a virtual environment")
    pip = [*pip_of(python, environment), "install", "--no-input", "--disable-pip-version-check"]
    wanted = [argument for file in files for argument in ("-r", str(file))]
    # The locks are complete; resolving them again would only try newer versions first.
    run([*pip, "--no-deps", *wanted], "installing the requirements")
    lay_over(environment, *over)
    (environment / MARKER).write_text("")
    say(f"built {environment} in {time.monotonic() - started:.0f} s")


def ensure(
    kind: str, python: str, version: str, files: tuple[Path, ...], over: tuple[Path, ...] = ()
) -> Path:
    """The cached environment for ``files``, laid over others; built if missing or broken."""
    facts = (python, version, platform.machine(), *map(str, over))
    name = f"{kind}-{digest(files, *facts)}"
    environment = cache_folder() / name
    with locked(cache_folder() / f"{name}.lock"):
        reason = problem(environment, files)
        if reason:
            say(f"building {environment}: {reason}")
            build(environment, python, files, over)
            reason = problem(environment, files)
            if reason:
                raise SetupError(f"{environment} is unusable right after its build: {reason}")
    return environment


def engine_environments() -> tuple[tuple[Path, ...], Path, str]:
    """SGLang's packages and the trainers' over them, miles', and the Python of all."""
    found = find_python(ENGINE_PYTHON)
    if found is None:
        raise SetupError(
            f"Python {ENGINE_PYTHON} is needed (SGLang's lock is for it) and was not found on PATH:"
            f" install python{ENGINE_PYTHON} with its venv module, or `pyenv install"
            f" {ENGINE_PYTHON}`"
        )
    python, version = found
    cache_folder().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_folder()).free >> 30
    ready = next(cache_folder().glob(f"env-*/{MARKER}"), None)
    if ready is None:
        say(f"SGLang and torch: about 6 minutes and 12 GB in {cache_folder()} ({free} GiB free)")
        if free < ENGINE_GIB:
            raise SetupError(
                f"{cache_folder()} has {free} GiB free and {ENGINE_GIB} are needed: make room, or"
                " set SHMROUTE_CACHE to a folder on another disk"
            )
    engine = ensure("env", python, version, ENGINE_LOCK)
    trainers = ensure("trainers", python, version, TRAINERS_LOCK)
    miles = ensure("miles", python, version, MILES_LOCK, over=(engine,))
    return (engine, trainers), miles, python


def reader_environments() -> dict[str, str]:
    """Python executable by version, for every other Python that can be equipped."""
    readers = {}
    for minor in READER_PYTHONS:
        found = find_python(minor)
        if found is None:
            continue
        try:
            environment = ensure(f"reader-{minor}", *found, READER_LOCK)
        except SetupError as error:
            say(f"no reader for Python {minor}: {error}")
        else:
            readers[minor] = str(environment / "bin/python")
    return readers


def stamp(environments: tuple[Path, ...]) -> str:
    """What the clone's ``.venv`` was made from; another value means make it again."""
    named = ("pyproject.toml", "setup.cfg", "setup.py")
    files = tuple(f for d in DISTRIBUTIONS for n in named if (f := d / n).exists())
    packages = sorted(str(p) for p in ROOT.glob("*/__init__.py"))
    return digest(files, *map(str, environments), str(ROOT), *packages)


def make_venv(environments: tuple[Path, ...], miles: Path, python: str) -> None:
    """The clone's own environment: the cached packages plus this tree, editable."""
    shutil.rmtree(VENV, ignore_errors=True)
    run([python, "-m", "venv", "--without-pip", str(VENV)], "making .venv")
    lay_over(VENV, *environments)
    (VENV / "environment").symlink_to(environments[0])
    (VENV / "miles").symlink_to(miles)
    pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", "--no-input"]
    flags = ["--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    editable = [argument for folder in DISTRIBUTIONS for argument in ("-e", str(folder))]
    run([*pip, *flags, *editable], "installing this tree into .venv", quiet=True)


def main() -> None:
    environments, miles, python = engine_environments()
    readers = reader_environments()
    wanted = stamp((*environments, miles))
    marker = VENV / MARKER
    with locked(cache_folder() / f"clone-{digest((), str(ROOT))}.lock"):
        if not marker.exists() or marker.read_text() != wanted:
            say(f"making {VENV}")
            make_venv(environments, miles, python)
            marker.write_text(wanted)
        (VENV / "readers.json").write_text(json.dumps(readers, indent=1) + "\n")
    say(f"ready: .venv (Python {ENGINE_PYTHON}), readers: {', '.join(readers) or 'none'}")


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"environment: {error}")
