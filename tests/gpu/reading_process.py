"""A trainer's process: it maps, page-locks and reads an arena that another process writes.

One JSON line in, one out, until stdin ends::

    {"ticket": base64, "layers": [first, end]}   lock the arena's heap, read the record onto the
                                                 GPU, whole and those layers; keep a view of it
    {"removed": arena}                           the arena's files are gone; drop the view
"""

from __future__ import annotations

import base64
import gc
import json
import sys
import time
import zlib
from typing import Any

import torch

from shmroute import ShmRouteReader, read_batch
from shmroute.attached import attach, attach_all
from shmroute.ticket import decode


class Reading:
    """One record of one arena, from the lock to its end."""

    def __init__(self, ticket: bytes) -> None:
        self._ticket = ticket
        self._attached: Any = attach(decode(ticket).segment)
        self._attached.page_locked(0)
        self._lock = self._attached._page_lock
        self._lock.wait(60)
        with ShmRouteReader(ticket) as routes:
            self._view: Any = routes.torch()

    def seen(self, first: int, end: int) -> dict[str, Any]:
        return {
            "refused": self._attached.page_lock_refused,
            "pinned": self._view.is_pinned(),
            "whole": self._crc(None),
            "part": self._crc(slice(first, end)),
        }

    def _crc(self, layers: slice | None) -> int:
        batch = read_batch(self._ticket, layers=layers, device="cuda")
        return zlib.crc32(batch.rows.cpu().numpy())

    def ended(self, arena: str) -> dict[str, bool]:
        while self._attached.leases.held() > 1:  # the view's own, once the copies are done
            time.sleep(0.005)
        time.sleep(0.05)  # the directory's clock ticks
        attach_all(arena)  # looks at it again, and forgets what is gone
        self._attached = None
        gc.collect()
        kept = self._lock.ready
        self._view = None
        gc.collect()
        return {"kept_by_a_view": kept, "unlocked_with_the_last_view": not self._lock.ready}


def main() -> None:
    torch.cuda.init()
    reading: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "ticket" in asked:
            reading = Reading(base64.b64decode(asked["ticket"]))
            answer = reading.seen(*asked["layers"])
        else:
            answer = reading.ended(asked["removed"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
