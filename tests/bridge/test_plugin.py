"""The plugin in SGLang's loader: nothing unless an arena is asked for, never left out unnoticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shmroute_cpu_platform
from children import ON_CPU, Child
from processes import Processes

from sglang_bridge.errors import StartRefused
from shmroute import segments


def start_without_arena(folder: Path) -> Child:
    return Child(folder, str(Path(__file__).with_name("without_arena.py")))


def start_help(folder: Path) -> Child:
    return Child(folder, "-m", "sglang.launch_server", "--help", **ON_CPU)


@pytest.fixture(scope="module")
def seen(processes: Processes) -> list[dict[str, Any]]:
    return json.loads(processes.done(start_without_arena).output().splitlines()[-1])


@pytest.fixture(scope="module")
def help_text(processes: Processes) -> str:
    return processes.done(start_help).output()


def test_without_an_arena_no_hook_is_registered_in_launcher_and_children(
    seen: list[dict[str, Any]],
) -> None:
    assert len(seen) == 2
    for process in seen:
        assert process["loaded"], "SGLang did not even load the plugin"
        assert process["hooks"] == []


def test_the_cpu_platform_does_not_activate_itself(seen: list[dict[str, Any]]) -> None:
    for process in seen:
        assert process["platform"] != "PlainCpuPlatform"
        assert not process["cpu_platform"]


@pytest.mark.parametrize("selected", [None, "", "cuda", "SHMROUTE_CPU"])
def test_the_cpu_platform_offers_itself_only_by_its_name(
    selected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if selected is None:
        monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    else:
        monkeypatch.setenv("SGLANG_PLATFORM", selected)
    assert shmroute_cpu_platform.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "shmroute_cpu")
    assert shmroute_cpu_platform.activate() is not None


def test_an_engine_that_is_given_no_device_gets_the_cpu(
    sglang: SimpleNamespace, tmp_path: Path
) -> None:
    from small_models import qwen3_moe

    model = qwen3_moe(tmp_path, num_experts=8, layers=1, hidden=32, expert_width=8)
    arguments = sglang.ServerArgs(model_path=str(model), skip_tokenizer_init=True)
    arguments.resolve_once()
    assert sglang.resolving_view(arguments).device == "cpu"


def test_help_shows_the_flags(help_text: str) -> None:
    for flag in (
        "arena", "capacity", "slots", "table", "on-full", "retention", "keep-versions",
        "checksum", "shadow",
    ):  # fmt: skip
        assert f"\n  --shmroute-{flag} " in help_text


# -- sglang_bridge.Engine ------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, sglang: SimpleNamespace) -> pytest.MonkeyPatch:
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.delenv("SHMROUTE_ARENA", raising=False)
    return monkeypatch


@pytest.mark.parametrize("allowed", ["other", "other, third", "shmroute_cpu", "SHMROUTE"])
def test_a_whitelist_that_leaves_the_plugin_out_is_noticed_before_anything_starts(
    allowed: str, environment: pytest.MonkeyPatch
) -> None:
    import sglang_bridge

    environment.setenv("SGLANG_PLUGINS", allowed)
    with pytest.raises(StartRefused, match=f"SGLANG_PLUGINS={allowed} leaves the plugin out"):
        sglang_bridge.Engine(model_path="nowhere", shmroute_arena="rollouts")
    assert "SHMROUTE_ARENA" not in os.environ


@pytest.mark.parametrize("allowed", ["", " ", "shmroute", "other,shmroute", " shmroute , x"])
def test_a_whitelist_with_the_plugin_in_it_is_fine(
    allowed: str, environment: pytest.MonkeyPatch
) -> None:
    from sglang_bridge.engine import check_plugin_allowed

    environment.setenv("SGLANG_PLUGINS", allowed)
    check_plugin_allowed()


def test_an_engine_without_an_arena_says_which_class_to_use(
    environment: pytest.MonkeyPatch,
) -> None:
    import sglang_bridge

    with pytest.raises(ValueError, match=r"shmroute_arena=NAME .* use sglang\.Engine"):
        sglang_bridge.Engine(model_path="nowhere")


# -- OpenAI's one place for routes -----------------------------------------------------------------


def refused(request: Any) -> str | None:
    from sglang_bridge.plugin import _refuse_several_choices

    return _refuse_several_choices(None, None, request)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("several", "fields"),
    [
        (False, {}),
        (False, {"n": 1}),
        (True, {"n": 2}),
        (True, {"n": 2, "stream": True}),
        # Here every choice carries its own meta_info.
        (False, {"n": 2, "return_meta_info": True}),
    ],
)
def test_chat_with_several_choices_is_refused(
    several: bool, fields: dict[str, Any], sglang: SimpleNamespace
) -> None:
    request = sglang.ChatCompletionRequest(**CHAT, **fields, return_routed_experts=True)
    message = refused(request)
    assert (message is not None) == several
    assert message is None or "native /generate" in message
    assert refused(sglang.ChatCompletionRequest(**CHAT, **fields)) is None


@pytest.mark.parametrize(
    ("several", "fields"),
    [
        (False, {"prompt": "one"}),
        (False, {"prompt": [1, 2, 3]}),
        (False, {"prompt": ["one"]}),
        (False, {"prompt": [[1, 2, 3]]}),
        (True, {"prompt": "one", "n": 3}),
        (True, {"prompt": ["one", "two"]}),
        (True, {"prompt": [[1, 2], [3]]}),
    ],
)
def test_completions_of_several_texts_are_refused(
    several: bool, fields: dict[str, Any], sglang: SimpleNamespace
) -> None:
    request = sglang.CompletionRequest(model="m", **fields, return_routed_experts=True)
    assert (refused(request) is not None) == several


def test_what_sglang_refuses_itself_keeps_its_own_message(sglang: SimpleNamespace) -> None:
    from sglang_bridge.plugin import _refuse_several_choices

    request = sglang.ChatCompletionRequest(**CHAT, n=2, return_routed_experts=True)
    assert _refuse_several_choices("sglang's own", None, request) == "sglang's own"


DYING = """
import os, sys, time
import shmroute
shmroute.Arena.create(sys.argv[1], shmroute.RouteLayout(8, 2, range(2)), capacity="1MiB", slots=8)
print("made", flush=True)
time.sleep(0.5)
os._exit(0)
"""


def test_an_arena_whose_killed_scheduler_takes_a_moment_to_die_is_reaped_all_the_same(
    sglang: SimpleNamespace, arena_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_bridge import plugin

    monkeypatch.setattr(plugin, "_launched", {arena_name})
    command = [sys.executable, "-c", DYING, arena_name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "made\n"
        assert list(segments.list_segments(arena_name))
        plugin._reap_after_kill(os.getpid(), None, os.getpid(), False)
        assert not list(segments.list_segments(arena_name))
