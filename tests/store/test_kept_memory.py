"""A batch's memory serves the next batch, and never one that somebody still holds."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from actors import add

import shmroute
from shmroute import RouteLayout, ShmRouteReader, read_batch

torch = pytest.importorskip("torch")

from shmroute import kept_memory  # noqa: E402

WIDTH = 8 << 20
LAYOUT = RouteLayout(256, 8, range(48))


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    kept_memory.forget()
    yield
    kept_memory.forget()


def address(tensor) -> int:
    return tensor.data_ptr()


def test_a_piece_that_came_back_is_given_again():
    piece = kept_memory.take(WIDTH)
    at = address(piece)
    del piece
    assert address(kept_memory.take(WIDTH)) == at


def test_it_comes_back_from_whatever_thread_lets_go_last():
    holder = [kept_memory.take(WIDTH)]
    at = address(holder[0])
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert address(kept_memory.take(WIDTH)) == at


@pytest.mark.parametrize(
    "held",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[5:6],
        lambda tensor: tensor.view(torch.int64),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[100:],
        lambda tensor: memoryview(tensor.numpy())[7:9],
        lambda tensor: np.from_dlpack(tensor),
    ],
    ids=["tensor", "slice", "other dtype", "array", "array slice", "buffer", "dlpack"],
)
def test_while_anything_of_it_is_held_it_is_not_given(held):
    tensor = kept_memory.take(WIDTH)
    at = tensor.data_ptr()
    rest = held(tensor)
    del tensor
    gc.collect()
    other = kept_memory.take(WIDTH)
    assert address(other) != at
    del rest, other
    gc.collect()


def test_a_result_may_be_half_of_its_piece_but_no_less():
    piece = kept_memory.take(WIDTH)
    at = address(piece)
    del piece
    half = kept_memory.take(WIDTH // 2)
    assert address(half) == at
    assert half.nbytes == WIDTH // 2
    del half
    assert kept_memory._free[0].nbytes == WIDTH
    small = kept_memory.take(WIDTH // 2 - 1)
    assert not kept_memory._free, "it was let go"
    assert small.nbytes == WIDTH // 2 - 1


def test_a_process_keeps_one_piece_and_no_small_one():
    pieces = [kept_memory.take(WIDTH) for _ in range(3)]
    known = {address(piece) for piece in pieces}
    assert len(known) == 3
    del pieces
    assert len(kept_memory._free) == 1
    assert kept_memory._free[0].ctypes.data in known
    kept_memory.forget()
    kept_memory.take(1000)
    assert not kept_memory._free


def test_a_batch_is_read_into_the_memory_of_one_that_is_gone(make_arena):
    arena = make_arena(LAYOUT, capacity="8MiB")
    tickets = [add(arena, f"{index}", tokens=2000 + index).ticket for index in range(4)]
    first = read_batch(tickets[:2]).rows
    at, expected = first.data_ptr(), first.clone()
    held = read_batch(tickets[2:]).rows
    assert held.data_ptr() != at, "the first is held"
    assert torch.equal(first, expected)
    del first
    third = read_batch(tickets[:2]).rows
    assert third.data_ptr() == at
    assert torch.equal(third, expected)
    for ticket, rows in zip(tickets[2:], held.split([2002, 2003]), strict=True):
        with ShmRouteReader(ticket) as routes:
            np.testing.assert_array_equal(rows.numpy(), routes.numpy())
    shmroute.release(tickets)
