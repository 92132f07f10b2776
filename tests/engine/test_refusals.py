"""Engines that must not start, and say why: real starts, every one of them fails.

No engine is started here that serves a request. The starts run two at a time:

===================  =============================================================================
renamed, launcher    a hook site has another name; the launcher notices
renamed, scheduler   it has another name in the scheduler process only
hierarchical cache   a refused feature, over the command line
trainer              the same in a server that a trainer starts from Python in a child process
small capacity       tables of 16,384 slots do not fit an arena of 1 MiB
small shm            a /dev/shm of 64 MiB (needs the right to mount)
===================  =============================================================================
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_process import EngineStartError, ServerProcess
from faults_support import CALM, FaultPlugin, SmallShmServer, TrainerServer

pytestmark = pytest.mark.engine

SGLANG = f"SGLang {importlib.metadata.version('sglang')}"
COLLECT = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._maybe_collect_routed_experts"
)
ARENA = f"refused-{os.getpid()}"
CAPACITY = f"--shmroute-capacity={16 << 20}"


@pytest.fixture(scope="module")
def starts(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]
) -> dict[str, Future[str]]:
    """The log of each failed start, by name, as a future; an engine that starts is an error."""
    model = checkpoint("qwen3-32")
    folder = tmp_path_factory.mktemp("refusals")
    plugin = FaultPlugin(folder)
    asked = (f"--shmroute-arena={ARENA}", CAPACITY)

    def renamed(where: str) -> ServerProcess:
        env = plugin.env("renamed", FAULT_SITE=COLLECT, FAULT_IN=where)
        return ServerProcess(model, *asked, env=env, log=folder / f"{where}.log")

    hierarchical = ("--enable-hierarchical-cache", "--skip-server-warmup")
    servers = {
        "renamed, scheduler": renamed("scheduler"),
        "renamed, launcher": renamed("launcher"),
        "hierarchical cache": ServerProcess(
            model, *asked, *hierarchical, env=CALM, log=folder / "hierarchical.log"
        ),
        "trainer": TrainerServer(
            model,
            "--enable-return-routed-experts",
            *hierarchical,
            env={**CALM, "SHMROUTE_ARENA": ARENA, "SHMROUTE_CAPACITY": "16MiB"},
            log=folder / "trainer.log",
        ),
        "small capacity": ServerProcess(
            model,
            f"--shmroute-arena={ARENA}",
            "--shmroute-capacity=1MiB",
            env=CALM,
            log=folder / "capacity.log",
        ),
        "small shm": SmallShmServer(
            model, f"--shmroute-arena={ARENA}", env=CALM, log=folder / "small.log"
        ),
    }

    def fail(server: ServerProcess) -> str:
        with pytest.raises(EngineStartError, match="ended with exit code"), server:
            pass
        assert server.observe() == set(), "processes are left"
        return server.log

    with ThreadPoolExecutor(2) as pool:
        return {name: pool.submit(fail, server) for name, server in servers.items()}


@pytest.fixture
def log(request: pytest.FixtureRequest, starts: dict[str, Future[str]]) -> str:
    """The log of the start that the test is marked with; no arena is left of it."""
    text = starts[request.param].result()
    left = [name for name in os.listdir("/dev/shm") if f"-{ARENA}-" in name]
    assert left == []
    return text


@pytest.mark.parametrize("log", ["renamed, launcher"], indirect=True)
def test_a_renamed_hook_site_stops_the_launcher(log: str) -> None:
    assert "was renamed, before shmroute's hooks: True" in log
    assert f"{SGLANG} has no {COLLECT}" in log
    assert "shmroute does not know this version" in log
    assert "Load weight begin" not in log  # it takes minutes with a real model


@pytest.mark.parametrize("log", ["renamed, scheduler"], indirect=True)
def test_a_hook_site_that_only_the_scheduler_lacks_stops_the_engine(log: str) -> None:
    assert "was renamed, before shmroute's hooks: " in log
    assert f"shmroute: the engine does not start: {SGLANG} has no {COLLECT}" in log
    assert "Uvicorn running" not in log


@pytest.mark.parametrize("log", ["hierarchical cache", "trainer"], indirect=True)
def test_a_refused_feature_stops_the_start_with_its_reason(log: str) -> None:
    assert "hierarchical cache does not go with --shmroute-arena" in log
    assert "it writes KV without a forward, which no tag would notice" in log
    assert "Load weight begin" not in log


def said_before_loading(pattern: str, log: str) -> re.Match[str]:
    """What the log says, and no weights were loaded, which takes minutes with a real model."""
    assert "Load weight begin" not in log
    said = re.search(pattern, log)
    assert said is not None, log[-3000:]
    return said


@pytest.mark.parametrize("log", ["small capacity"], indirect=True)
def test_a_capacity_that_no_row_fits_stops_the_start_with_figures(log: str) -> None:
    said = said_before_loading(
        r"StartRefused: --shmroute-capacity, --shmroute-slots: a capacity of 1048576 bytes cannot "
        r"hold the tables of 16384 slots and one row of 1 bytes or more: at least (\d+) bytes are "
        r"needed",
        log,
    )
    assert int(said[1]) > 1 << 20


def may_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs the right to make a mount namespace")
@pytest.mark.parametrize("log", ["small shm"], indirect=True)
def test_a_dev_shm_that_is_too_small_stops_the_start_with_figures_and_remedy(log: str) -> None:
    said = said_before_loading(
        r"ArenaTooSmall: arena \S+ needs 8192\.0 MiB of shared memory, ([\d.]+) MiB can be had "
        r"\(limited by the size of /dev/shm\)\. Remedy: (.+)",
        log,
    )
    assert 0 < float(said[1]) <= 64
    for remedy in ("--shm-size", "--ipc=host", "--shmroute-capacity"):
        assert remedy in said[2]
