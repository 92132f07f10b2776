"""One rank of a miles trainer, in a process of its own: what test_miles.py has two of do."""

from __future__ import annotations

import base64
import os
import pickle
import time
from pathlib import Path

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import numpy as np
import torch.distributed as dist
from miles.utils.distributed_utils import init_gloo_group
from peer_process import serve
from rollouts import NUM_LAYERS, TOP_K

from shmroute.replay import miles, row_ranges
from shmroute.replay.travelling import TravellingRows

#: How long a rank that does not wait for the others would have had to release.
_LATE_S = 1.5


def join(rank: int, store: str) -> None:
    """Meet the other rank."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    init_gloo_group()


def train(ticket: str, native: str, wanting: str, slow: bool) -> bool:
    """Read a sample's rows and begin the training step; whether the rows are those expected.

    Parameters
    ----------
    wanting
        A file that the fast rank makes when it has its rows and wants to release the record.
    slow
        This rank reads after that.
    """
    if slow:
        while not Path(wanting).exists():
            time.sleep(0.01)
        time.sleep(_LATE_S)
    turn, _ = row_ranges.rows_of(ticket, top_k=TOP_K)
    rows = pickle.loads(pickle.dumps(TravellingRows([turn], NUM_LAYERS, TOP_K, miles.load)))
    if not slow:
        Path(wanting).touch()
    miles.release_loaded(None, 0, 0, None, None, None)
    expected = np.frombuffer(base64.b64decode(native), np.int32)
    return np.array_equal(rows, expected.reshape(-1, NUM_LAYERS, TOP_K))


if __name__ == "__main__":
    serve(globals())
