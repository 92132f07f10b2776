"""Runs: every row of every record goes through staging once, to where its extent is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sglang_bridge.staging import PIECES_MAX, plan_runs
from shmroute import RouteLayout
from shmroute.layout import plan_extent

ROUTES = RouteLayout(256, 3, range(5))
ROW = ROUTES.row_bytes


def jobs_at(lengths: list[int], gaps: list[bool]) -> list[Any]:
    """Records one after the other in the heap, with a gap before those that say so."""
    jobs, offset = [], 0
    for tokens, gap in zip(lengths, gaps, strict=True):
        offset += 4096 if gap else 0
        plan = plan_extent(ROUTES.row_bytes, 8, tokens)
        record = SimpleNamespace(offset=offset, plan=plan)
        jobs.append(SimpleNamespace(record=record, request=SimpleNamespace(tokens=tokens)))
        offset += plan.total_bytes
    return jobs


records = st.lists(st.tuples(st.integers(1, 900), st.booleans()), min_size=1, max_size=40)


@given(records, st.integers(1, 400), st.integers(1, 400))
def test_runs_cover_each_row_once_within_their_lane(
    drawn: list[tuple[int, bool]], lane: int, lane_rows: int
) -> None:
    jobs = jobs_at([n for n, _ in drawn], [gap for _, gap in drawn])
    seen: dict[int, list[tuple[int, int]]] = {}
    ended = []
    for run in plan_runs(jobs, ROW, lane * ROW, lane_rows):
        assert 0 < run.nbytes <= lane * ROW
        assert run.rows == sum(piece.rows for piece in run.pieces) <= lane_rows
        tags = 0
        for piece in run.pieces:
            assert piece.tag == tags
            tags += piece.rows
            assert run.offset + piece.place == piece.job.record.offset + piece.first * ROW
            assert piece.place + piece.rows * ROW <= run.nbytes
            seen.setdefault(id(piece.job), []).append((piece.first, piece.rows))
            ended += [piece.job] if piece.last else []
    assert ended == jobs
    for job in jobs:
        at = 0
        for first, rows in seen[id(job)]:
            assert first == at
            at += rows
        assert at == job.request.tokens


def test_records_that_lie_together_are_one_copy() -> None:
    jobs = jobs_at([100] * 50, [False] * 50)
    assert len(list(plan_runs(jobs, ROW, 1 << 20, 1 << 16))) == 1
    jobs = jobs_at([100] * 50, [True] * 50)
    assert len(list(plan_runs(jobs, ROW, 1 << 20, 1 << 16))) == 50


def test_a_run_has_no_more_pieces_than_its_buffers() -> None:
    jobs = jobs_at([1] * (2 * PIECES_MAX + 1), [False] * (2 * PIECES_MAX + 1))
    runs = list(plan_runs(jobs, ROW, 1 << 20, 1 << 16))
    assert [len(run.pieces) for run in runs] == [PIECES_MAX, PIECES_MAX, 1]
