"""Settings travel as flags, environment variables and Engine arguments, and mean the same."""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace

import pytest

from sglang_bridge import settings
from sglang_bridge.settings import Settings

EVERY = {
    "arena": ("rollouts", "rollouts"),
    "capacity": ("2GiB", 2 << 30),
    "slots": ("512", 512),
    "table": ("host", "host"),
    "on_full": ("error", "error"),
    "retention": ("12.5", 12.5),
    "keep_versions": ("3", 3),
    "checksum": ("1", True),
    "shadow": ("true", True),
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for field in dataclasses.fields(Settings):
        monkeypatch.delenv("SHMROUTE_" + field.name.upper(), raising=False)
    return monkeypatch


def parse(*argv: str) -> Settings:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    return settings.from_arguments(parser.parse_args(argv))


def test_every_setting_is_tried_here() -> None:
    assert set(EVERY) == {field.name for field in dataclasses.fields(Settings)}


def test_no_arena_is_the_default() -> None:
    assert Settings.from_environment({}).arena == ""


@pytest.mark.parametrize("name", EVERY)
def test_a_flag_and_its_variable_mean_the_same(name: str, environment: pytest.MonkeyPatch) -> None:
    text, value = EVERY[name]
    flag = "--shmroute-" + name.replace("_", "-")
    given = (flag,) if isinstance(value, bool) else (flag, text)
    by_flag = parse("--shmroute-arena", "rollouts", *given)
    by_variable = Settings.from_environment(
        {"SHMROUTE_ARENA": "rollouts", "SHMROUTE_" + name.upper(): text}
    )
    assert getattr(by_flag, name) == value
    assert by_flag == by_variable


def test_what_a_launcher_writes_its_children_read() -> None:
    wanted = Settings(**{name: value for name, (_, value) in EVERY.items()})
    carried: dict[str, str] = {}
    wanted.to_environment(carried)
    assert Settings.from_environment(carried) == wanted


def test_a_default_takes_a_variable_of_an_earlier_engine_away() -> None:
    carried = {"SHMROUTE_SHADOW": "1", "SHMROUTE_SLOTS": "3"}
    Settings(arena="next").to_environment(carried)
    assert carried == {"SHMROUTE_ARENA": "next"}


def test_a_flag_wins_over_the_environment_and_absent_flags_leave_it(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("SHMROUTE_ARENA", "from-environment")
    environment.setenv("SHMROUTE_SLOTS", "7")
    environment.setenv("SHMROUTE_SHADOW", "1")
    found = parse("--shmroute-slots", "9")
    assert (found.arena, found.slots, found.shadow) == ("from-environment", 9, True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("arena", "a/b"),
        ("capacity", "much"),
        ("slots", "x"),
        ("table", "disk"),
        ("on_full", "wait"),
        ("retention", "long"),
        ("keep_versions", "all"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_flag(
    name: str, text: str, environment: pytest.MonkeyPatch
) -> None:
    flag = "--shmroute-" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{flag}: "):
        parse("--shmroute-arena", "rollouts", flag, text)
    variable = "SHMROUTE_" + name.upper()
    with pytest.raises(ValueError, match=f"^{variable}: "):
        Settings.from_environment({variable: text})


def test_a_switch_that_is_neither_true_nor_false_is_named() -> None:
    with pytest.raises(ValueError, match=r"^SHMROUTE_SHADOW: 'perhaps'"):
        Settings.from_environment({"SHMROUTE_SHADOW": "perhaps"})


def test_a_flag_without_an_arena_is_an_error_and_not_ignored(
    environment: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"--shmroute-on-full needs --shmroute-arena"):
        parse("--shmroute-on-full", "error")


@pytest.mark.parametrize("name", EVERY)
def test_an_engine_argument_means_the_same_as_text_and_as_a_value(
    name: str, sglang: SimpleNamespace
) -> None:
    from sglang_bridge.engine import with_arguments

    text, value = EVERY[name]
    for given in (text, value):
        found = with_arguments(Settings(arena="rollouts"), {"shmroute_" + name: given})
        assert getattr(found, name) == value


def test_an_engine_argument_that_cannot_be_is_named(sglang: SimpleNamespace) -> None:
    from sglang_bridge.engine import with_arguments

    with pytest.raises(ValueError, match=r"^shmroute_on_full: "):
        with_arguments(Settings(), {"shmroute_on_full": "wait"})
    with pytest.raises(TypeError, match="shmroute_capasity"):
        with_arguments(Settings(), {"shmroute_capasity": "1GiB"})
