"""An SGLang that is not the one the bridge knows stops the start, by version and by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from children import ON_CPU, Child
from processes import Processes

from sglang_bridge import sites

BASIC = (sites.ADD_ARGUMENTS, sites.FROM_ARGUMENTS, sites.RESOLVE)
EVERY = {site.target: site for site in (*BASIC, *sites.LAUNCHER, *sites.SCHEDULER, *sites.USED)}
TAKING = [target for target, site in EVERY.items() if set(site.parameters) - {"self"}]
ATTRIBUTES = [(target, name) for target, names in sites.ATTRIBUTES.items() for name in names]


def short(target: str) -> str:
    return ".".join(target.split(".")[-2:])


def start_wrong_sglang(folder: Path) -> Child:
    return Child(folder, str(Path(__file__).with_name("wrong_sglang.py")), **ON_CPU)


@pytest.fixture(scope="module")
def found(processes: Processes) -> dict[str, str | None]:
    """What the start check said about each change to a real SGLang."""
    return json.loads(processes.done(start_wrong_sglang).output().splitlines()[-1])


def test_this_sglang_is_known(found: dict[str, str | None]) -> None:
    assert found["nothing"] is None
    assert found["everything back"] is None


@pytest.mark.parametrize("target", EVERY, ids=short)
def test_a_renamed_site_stops_the_start(target: str, found: dict[str, str | None]) -> None:
    message = found[f"renamed {target}"]
    assert message is not None
    assert f"SGLang {sites.version()} has no {target}" in message


@pytest.mark.parametrize("target", TAKING, ids=short)
def test_a_site_with_another_signature_stops_the_start(
    target: str, found: dict[str, str | None]
) -> None:
    message = found[f"changed {target}"]
    assert message is not None
    assert message.startswith(f"SGLang {sites.version()}: {target} does not take ")
    missing = [name for name in EVERY[target].parameters if name != "self"]
    assert all(name in message for name in missing)


@pytest.mark.parametrize(("target", "name"), ATTRIBUTES, ids=lambda part: part.split(".")[-1])
def test_a_missing_attribute_stops_the_start(
    target: str, name: str, found: dict[str, str | None]
) -> None:
    message = found[f"without {target}.{name}"]
    assert message is not None
    assert message.startswith(f"SGLang {sites.version()}: {target} has no {name};")


@pytest.mark.parametrize(
    "target", [target for target, site in EVERY.items() if site.own], ids=short
)
def test_a_base_class_form_of_a_site_is_not_taken_for_it(
    target: str, found: dict[str, str | None]
) -> None:
    message = found[f"inherited {target}"]
    assert message is not None
    assert f"SGLang {sites.version()} has no {target}, only a base class's" in message


@pytest.mark.parametrize("target", [site.target for site in sites.SCHEDULER], ids=short)
def test_a_hook_that_was_not_applied_is_noticed(target: str, found: dict[str, str | None]) -> None:
    message = found[f"not hooked {target}"]
    assert message is not None
    assert f"SGLang {sites.version()} did not apply the hook on {target}" in message


def test_all_hooks_of_a_scheduler_are_applied(found: dict[str, str | None]) -> None:
    assert found["all hooked"] is None


def test_registering_ends_the_process_because_sglang_would_swallow_an_exception(
    found: dict[str, str | None],
) -> None:
    message = found["registered"]
    assert message is not None
    assert message.startswith("SystemExit: shmroute: the engine does not start: SGLang ")
    assert sites.RESOLVE.target in message
