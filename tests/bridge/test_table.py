"""The route table keeps each KV location's latest routes, or that it has none."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, Forwards

from sglang_bridge.errors import StartRefused
from sglang_bridge.table import RouteTable, place_table
from sglang_bridge.tags import INVALID, expected_places, wrong_rows
from shmroute import RouteLayout

LOCATIONS = 500


def make_table(routes: RouteLayout) -> RouteTable:
    return RouteTable(routes, LOCATIONS, "cpu", vocabulary=VOCABULARY)


@pytest.fixture(params=[8, 256, 257, 512])
def forwards(request: pytest.FixtureRequest) -> Forwards:
    """Forwards of a model with one dense layer and that many experts."""
    return Forwards(make_table(RouteLayout(request.param, 4, range(1, 6), num_layers=6)))


def read(table: RouteTable, locations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.zeros((len(locations), *table.routes.row_shape), dtype=table.routes.dtype)
    tags = table.gather(torch.from_numpy(locations), table.as_storage(rows))
    return rows, tags.numpy()


def test_gathered_rows_are_the_scattered_ones_bit_for_bit(forwards: Forwards) -> None:
    ids, locations = forwards.token_ids(200), forwards.locations(200)
    captured = forwards.run(ids, locations, start=10)
    rows, tags = read(forwards.table, locations)
    assert rows.max() == forwards.table.routes.num_experts - 1  # 255 in uint8, 511 in uint16
    np.testing.assert_array_equal(rows, captured[:, 1:])
    assert not wrong_rows(tags, expected_places(ids, 10, VOCABULARY)).any()


def test_dense_layers_take_no_room(forwards: Forwards) -> None:
    routes = forwards.table.routes
    assert forwards.table.nbytes == LOCATIONS * (5 * 4 * routes.dtype.itemsize + 8)


def test_the_latest_forward_at_a_location_wins(forwards: Forwards) -> None:
    locations = forwards.locations(50)
    forwards.run(forwards.token_ids(50), locations)
    ids = forwards.token_ids(50)
    captured = forwards.run(ids, locations, start=3)
    rows, tags = read(forwards.table, locations)
    np.testing.assert_array_equal(rows, captured[:, 1:])
    assert not wrong_rows(tags, expected_places(ids, 3, VOCABULARY)).any()


def test_int32_locations_and_tokens_are_taken_as_sglang_has_them(forwards: Forwards) -> None:
    captured = forwards.routes(3)
    forwards.table.scatter(
        torch.from_numpy(captured.copy()),
        torch.tensor([5, 7, 9], dtype=torch.int32),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        torch.tensor([0, 1, 2], dtype=torch.int64),
        0,
    )
    rows, _ = read(forwards.table, np.array([5, 7, 9], dtype=np.int32))
    np.testing.assert_array_equal(rows, captured[:, 1:])


@pytest.mark.parametrize("fault", ["never captured", "too large", "negative", "twice"])
def test_a_row_that_no_router_can_have_chosen_is_missing_and_its_neighbours_are_not(
    forwards: Forwards, fault: str
) -> None:
    ids, locations = forwards.token_ids(30), forwards.locations(30)
    captured = forwards.routes(30)
    if fault == "never captured":
        captured[11, 4] = -1
    elif fault == "too large":
        captured[11, 4, 2] = forwards.table.routes.num_experts
    elif fault == "negative":
        captured[11, 4, 2] = -1
    else:
        captured[11, 4, 2] = captured[11, 4, 0]
    forwards.run(ids, locations, routes=captured)
    wrong = wrong_rows(read(forwards.table, locations)[1], expected_places(ids, 0, VOCABULARY))
    assert np.flatnonzero(wrong).tolist() == [11]


def test_what_a_dense_layer_leaves_in_the_buffer_does_not_matter(forwards: Forwards) -> None:
    ids, locations = forwards.token_ids(30), forwards.locations(30)
    captured = forwards.routes(30)
    captured[:, 0] = -1
    forwards.run(ids, locations, routes=captured)
    assert (read(forwards.table, locations)[1] >= 0).all()


def test_the_capture_buffer_keeps_no_routes_for_a_layer_that_does_not_capture_next_time(
    forwards: Forwards,
) -> None:
    captured = torch.from_numpy(forwards.routes(3))
    where, ids = torch.tensor([5, 7, 9]), torch.tensor([1, 2, 3])
    forwards.table.scatter(captured, where, ids, torch.arange(3), 0)
    assert (captured == -1).all()


def test_the_same_id_in_two_layers_is_nothing_odd() -> None:
    forwards = Forwards(make_table(RouteLayout(8, 1, range(3))))
    captured = np.full((4, 3, 1), 7, dtype=np.int32)
    locations = forwards.locations(4)
    forwards.run(forwards.token_ids(4), locations, routes=captured)
    assert (read(forwards.table, locations)[1] >= 0).all()


def test_forget_makes_every_row_missing_until_it_is_computed_again(forwards: Forwards) -> None:
    ids, locations = forwards.token_ids(40), forwards.locations(40)
    forwards.run(ids, locations)
    forwards.table.forget()
    assert (read(forwards.table, locations)[1] == INVALID).all()
    forwards.run(ids[:10], locations[:10])
    tags = read(forwards.table, locations)[1]
    assert (tags[:10] >= 0).all()
    assert (tags[10:] == INVALID).all()


def test_a_location_beyond_the_table_is_an_error_and_not_another_row(forwards: Forwards) -> None:
    with pytest.raises(IndexError):
        read(forwards.table, np.array([LOCATIONS]))


def test_a_forward_of_no_tokens_changes_nothing(forwards: Forwards) -> None:
    """A data-parallel rank without work runs such forwards all the time."""
    ids, locations = forwards.token_ids(20), forwards.locations(20)
    captured = forwards.run(ids, locations)
    forwards.run(forwards.token_ids(0), forwards.locations(0))
    rows, tags = read(forwards.table, locations)
    np.testing.assert_array_equal(rows, captured[:, 1:])
    assert (tags >= 0).all()


# -- a prefix restored from a host KV cache ------------------------------------------------------


def restored(table: RouteTable, ids: np.ndarray, locations: np.ndarray) -> np.ndarray:
    """Mask of the rows that are missing once KV was copied to ``locations``, and no rows were."""
    return wrong_rows(read(table, locations)[1], expected_places(ids, 0, VOCABULARY))


@pytest.mark.parametrize("former", ["nobody", "other tokens", "the same tokens, one further on"])
def test_rows_of_a_restored_prefix_are_missing_whoever_was_there_before(
    forwards: Forwards, former: str
) -> None:
    ids, locations = forwards.token_ids(30), forwards.locations(60)
    forwards.run(ids, locations[:30])  # where it was computed, before it went to the host
    if former == "other tokens":
        forwards.run((ids + 1) % VOCABULARY, locations[30:])
    elif former != "nobody":
        forwards.run(ids, locations[30:], start=1)
    assert restored(forwards.table, ids, locations[30:]).all()


def test_a_former_occupant_with_the_same_tokens_at_the_same_positions_passes_for_the_prefix(
    forwards: Forwards,
) -> None:
    """What tags cannot tell, and why the engine's hierarchical cache is refused at start.

    Whoever copies KV must declare the rows at its destinations invalid.
    """
    ids, locations = forwards.token_ids(30), forwards.locations(60)
    forwards.run(ids, locations[:30])
    forwards.run(ids, locations[30:])
    assert not restored(forwards.table, ids, locations[30:]).any()
    forwards.table.forget()
    assert restored(forwards.table, ids, locations[30:]).all()


# -- memory of a colocated trainer ---------------------------------------------------------------


def storage_bytes(table: RouteTable) -> int:
    return sum(part.untyped_storage().nbytes() for part in (table.rows, table.words, table.tags))


def test_memory_that_is_given_back_is_really_freed(forwards: Forwards) -> None:
    """No view of it may keep a copy; kernels have its addresses, so the tensors stay."""
    rows, tags = forwards.table.rows, forwards.table.tags
    forwards.table.give_back()
    assert storage_bytes(forwards.table) == 0
    assert forwards.table.rows is rows
    assert forwards.table.tags is tags


def test_memory_that_is_taken_again_is_as_large_and_every_row_is_invalid(
    forwards: Forwards,
) -> None:
    ids, locations = forwards.token_ids(40), forwards.locations(40)
    forwards.run(ids, locations)
    before = storage_bytes(forwards.table)
    forwards.table.give_back()
    forwards.table.take_again()
    assert storage_bytes(forwards.table) == before
    assert (forwards.table.tags == INVALID).all()


def test_after_taking_memory_again_rows_are_valid_once_forwards_ran(forwards: Forwards) -> None:
    ids, locations = forwards.token_ids(40), forwards.locations(40)
    forwards.run(ids, locations)
    forwards.table.give_back()
    forwards.table.take_again()
    captured = forwards.run(ids[:10], locations[:10])
    rows, tags = read(forwards.table, locations)
    np.testing.assert_array_equal(rows[:10], captured[:, 1:])
    assert (tags[:10] >= 0).all()
    assert (tags[10:] == INVALID).all()


# -- where it lives ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["auto", "host"])
def test_on_a_cpu_engine_the_table_is_in_its_memory(where: str) -> None:
    table = place_table(where, RouteLayout(8, 2, range(3)), LOCATIONS, "cpu", VOCABULARY)
    assert table.rows.device.type == "cpu"
    assert not table.in_host_memory  # page-locked, for a device that writes into it
    assert table.device_bytes == table.nbytes


def test_a_gpu_s_table_is_refused_on_a_cpu_engine() -> None:
    with pytest.raises(StartRefused, match="runs on a CPU; leave it at auto"):
        place_table("gpu", RouteLayout(8, 2, range(3)), LOCATIONS, "cpu", VOCABULARY)


# Tensors without memory: what is on no CPU is on a device.
DEVICE = "meta"
PLACED = RouteLayout(8, 2, range(3))
MANY = 1 << 20
NEEDED = MANY * (PLACED.row_bytes + 8)


class PageLocked(torch.Tensor):
    """Host memory that a driver has locked."""

    def is_pinned(self, device: torch.device | None = None) -> bool:
        return True


def place(patch: pytest.MonkeyPatch, where: str, free: int) -> RouteTable:
    """The table of an engine on a device with so many bytes left."""
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    patch.setattr(
        "sglang_bridge.table.pinned_tensor",
        lambda nbytes, **_: torch.zeros(nbytes, dtype=torch.uint8).as_subclass(PageLocked),
    )
    return place_table(where, PLACED, MANY, DEVICE, VOCABULARY)


@pytest.mark.parametrize(("where", "free"), [("auto", 2 * NEEDED), ("gpu", 0)])
def test_the_table_is_on_the_device_where_half_of_its_memory_is_enough_or_the_user_insists(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, free: int
) -> None:
    table = place(monkeypatch, where, free)
    assert not table.in_host_memory
    assert {table.rows.device.type, table.tags.device.type} == {DEVICE}
    assert table.device_bytes == table.nbytes == NEEDED
    assert not caplog.records


@pytest.mark.parametrize(("where", "free"), [("auto", 2 * NEEDED - 1), ("host", 1 << 40)])
def test_its_rows_are_in_host_memory_where_half_is_not_enough_or_the_user_insists(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, free: int
) -> None:
    table = place(monkeypatch, where, free)
    assert table.in_host_memory
    assert (table.rows.device.type, table.tags.device.type) == ("cpu", DEVICE)
    assert (table.device_bytes, table.nbytes) == (MANY * 8, NEEDED)
    assert len(caplog.records) == (where == "auto")


def test_auto_says_what_the_table_needs_and_what_was_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "shmroute"):
        place(monkeypatch, "auto", 20 << 20)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "shmroute: a route table of 14.0 MiB would take more than half of the 20.0 MiB left on "
        "meta: its rows go to page-locked host memory"
    )
