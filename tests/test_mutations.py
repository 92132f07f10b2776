"""Every guard of the protocol has a test that fails without it: see ``mutations``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from guards import GUARDS, Guard
from mutations import ROOT, Gate, Outcome, SourceCopy, check_text, has_cuda, print_table

EACH = [
    pytest.param(guard, id=guard.name, marks=[pytest.mark.gpu] if guard.gpu else [])
    for guard in GUARDS
]


@pytest.fixture(scope="module")
def gate(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gate]:
    """Takes out all guards that this session asks for, beside the tests that wait for each."""
    asked = [
        item.callspec.params["guard"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.originalname == test_without_it_a_test_fails.__name__
    ]
    guards = [guard for guard in asked if not guard.gpu or has_cuda()]
    made = Gate(tmp_path_factory.mktemp("mutations"), guards)
    yield made
    made.close()


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[Guard, Outcome]]:
    """What became of each guard; printed at the end (``-s`` shows it)."""
    found: dict[Guard, Outcome] = {}
    yield found
    print_table(found)


@pytest.mark.gate
@pytest.mark.parametrize("guard", EACH)
def test_without_it_a_test_fails(guard: Guard, gate: Gate, outcomes: dict[Guard, Outcome]) -> None:
    if guard.gpu and not has_cuda():
        pytest.skip("no CUDA device here")
    unchanged = gate.unchanged(guard.suite)
    assert unchanged.how == "passed", unchanged.output
    outcome = outcomes[guard] = gate.outcome(guard)
    if outcome.how == "skipped":
        pytest.skip(f"its tests are skipped here: {outcome.output}")
    assert outcome.noticed, (
        f"without {guard.name} in {guard.file} these tests {outcome.how}: "
        f"{', '.join(guard.noticed_by)}\n{outcome.output}"
    )


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_its_text_stands_once_in_its_file(guard: Guard) -> None:
    """If this fails, the file was changed and ``guards`` was not."""
    check_text(guard, (ROOT / guard.file).read_text())


def test_every_guard_has_a_name_of_its_own() -> None:
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)


WHERE = """
import subprocess, sys
import shmroute, sglang_bridge
print(shmroute.__file__, sglang_bridge.__file__)
if "child" not in sys.argv:
    subprocess.run([sys.executable, "-c", sys.argv[1], "", "child"], check=True)
"""


def test_a_copy_is_what_its_processes_and_their_children_import(tmp_path: Path) -> None:
    copy = SourceCopy(tmp_path / "copy")
    command = [sys.executable, "-c", WHERE, WHERE]
    said = subprocess.run(
        command, cwd=tmp_path, env=copy.environment(), capture_output=True, text=True, check=True
    )
    found = [Path(path) for path in said.stdout.split()]
    assert len(found) == 4
    assert all(path.is_relative_to(copy.root) for path in found)
