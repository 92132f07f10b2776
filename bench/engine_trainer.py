"""The trainer process of ``engine.py``: gets what a response carries, makes rows of it.

    python bench/engine_trainer.py arena|native LAYERS TOP_K

One header line and that many bytes come in on stdin (``WHERE BYTES\\n``), one JSON line goes
out: ``at``, the CLOCK_MONOTONIC time at which the rows were there, ``rows``, and ``seconds``
spent here. WHERE is ``host``, an array in this process, or ``cuda``, a tensor on the GPU,
synchronised. What comes is the text of ``meta_info["routed_experts"]``: a ticket, or with
``native`` the rows themselves.

`TrainerProcess` is the other end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class TrainerProcess:
    """Runs this file as a process of its own and asks it to read."""

    def __init__(self, kind: str, layers: int, top_k: int, places: tuple[str, ...]) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__, kind, str(layers), str(top_k), *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answer()  # it is ready

    @property
    def pid(self) -> int:
        return self._child.pid

    def read(self, routes: str, where: str) -> dict[str, float]:
        assert self._child.stdin is not None
        text = routes.encode()
        self._child.stdin.write(f"{where} {len(text)}\n".encode() + text)
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the trainer ended with exit code {self._child.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End it; calling it twice is harmless."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


class ArenaRoutes:
    """Rows by ticket; the record is released after each read."""

    def read(self, text: bytes, where: str) -> tuple[int, float]:
        from shmroute import ShmRouteReader

        with ShmRouteReader(text.decode()) as routes:
            if where == "cuda":
                rows: Any = _synchronised(routes.torch(device="cuda"))
            else:
                rows = routes.numpy()
            at, count = time.perf_counter(), len(rows)
            del rows
            routes.release()
        return count, at


class NativeRoutes:
    """Rows out of the response's own text."""

    def __init__(self, layers: int, top_k: int) -> None:
        self._shape = (-1, layers, top_k)

    def read(self, text: bytes, where: str) -> tuple[int, float]:
        import numpy as np
        import pybase64

        rows: Any = np.frombuffer(pybase64.b64decode_as_bytearray(text), dtype=np.int32)
        rows = rows.reshape(self._shape)
        if where == "cuda":
            import torch

            rows = _synchronised(torch.from_numpy(rows).to("cuda"))
        return len(rows), time.perf_counter()


def _synchronised(rows: Any) -> Any:
    import torch

    torch.cuda.synchronize()
    return rows


def main() -> None:
    kind, layers, top_k, *places = sys.argv[1:]
    if "cuda" in places:
        import torch

        torch.zeros(1, device="cuda")
    source = ArenaRoutes() if kind == "arena" else NativeRoutes(int(layers), int(top_k))
    print(json.dumps({"ready": 1}), flush=True)
    for header in sys.stdin.buffer:
        where, size = header.split()
        text = sys.stdin.buffer.read(int(size))
        began = time.perf_counter()
        rows, at = source.read(text, where.decode())
        print(json.dumps({"rows": rows, "at": at, "seconds": at - began}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
