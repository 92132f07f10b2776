"""Where the route table goes by what the device really has left."""

from __future__ import annotations

import logging

import pytest
import torch

from sglang_bridge.errors import StartRefused
from sglang_bridge.table import place_table
from shmroute import RouteLayout

pytestmark = pytest.mark.gpu

DEVICE, ROUTES = "cuda:0", RouteLayout(128, 8, range(48))
LOCATIONS = 1 << 20
NEEDED = LOCATIONS * (ROUTES.row_bytes + 8)
# Other memory of the process may come or go between two looks.
_LEEWAY = 64 << 20


def take_all_but(left: int) -> torch.Tensor:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0]
    if free < left + _LEEWAY:
        pytest.skip(f"{free >> 20} MiB are free on {DEVICE}, {left >> 20} are wanted")
    return torch.empty(free - left, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize(
    ("left", "in_host_memory"), [(2 * NEEDED + _LEEWAY, False), (2 * NEEDED - _LEEWAY, True)]
)
def test_auto_goes_to_host_memory_where_the_table_would_take_more_than_half_of_what_is_left(
    caplog: pytest.LogCaptureFixture, left: int, in_host_memory: bool
) -> None:
    taken = take_all_but(left)
    with caplog.at_level(logging.WARNING, "shmroute"):
        table = place_table("auto", ROUTES, LOCATIONS, DEVICE, 1000)
    assert table.in_host_memory is in_host_memory
    assert table.rows.device.type == ("cpu" if in_host_memory else "cuda")
    assert table.rows.is_pinned() is in_host_memory
    assert len(caplog.records) == in_host_memory
    ids = torch.arange(48 * 8, dtype=torch.int32, device=DEVICE).view(1, 48, 8) % 128
    where, token = (torch.tensor([at], device=DEVICE) for at in (LOCATIONS - 1, 5))
    table.scatter(ids.clone(), where, token, token, 0)
    torch.cuda.synchronize()
    assert torch.equal(table.rows[-1].cpu().int(), ids.view(-1).cpu())
    del taken


def test_a_table_that_fits_nowhere_on_the_device_is_refused_with_figures() -> None:
    taken = take_all_but(NEEDED // 2)
    with pytest.raises(StartRefused, match=r"of 392\.0 MiB for 1048576 KV tokens does not fit"):
        place_table("gpu", ROUTES, LOCATIONS, DEVICE, 1000)
    del taken
