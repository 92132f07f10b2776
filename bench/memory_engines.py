"""Real SGLang servers whose memory is read: routes off, natively, or with an arena.

The three differ in nothing but the routes: the same model, the same KV pool, the same requests.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import engine_memory
import numpy as np
from engine_process import SHARED_MEMORY, ServerProcess, inodes_in_use
from engine_setup import has_gpu
from memory_watch import MemoryWatch
from route_chains import LAYERS

import shmroute

Way = Literal["off", "native", "arena"]
WAYS: tuple[Way, ...] = ("off", "native", "arena")

OUTPUT_TOKENS = 8
VOCABULARY = 1024
FIRST_TOKEN = 6  # the ids before it are special
AT_ONCE = 8
START_SECONDS = 400.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Memory of an engine at one moment.

    Attributes
    ----------
    roles
        Fields of `engine_memory.of_process` by what each process is.
    shm
        Bytes in /dev/shm that its processes have mapped or open, the arena's own counted apart.
    arena
        ``taken`` and ``in_use`` bytes of the arena, its ``table``; empty without one.
    gpu
        Bytes in use on the GPU, None without one.
    """

    roles: dict[str, dict[str, int]]
    shm: int
    arena: dict[str, int]
    gpu: int | None

    def total(self, field: str) -> int:
        return sum(process.get(field, 0) for process in self.roles.values())


class MeasuredEngine:
    """One server, its requests, and looks at its memory.

    Parameters
    ----------
    kv_tokens
        Size of the KV pool, which the native table covers.
    capacity
        Of the arena.
    quick
        Start it without SGLang's own warm-up, with dummy weights, and with all layers whatever the
        checkpoint has.
    """

    def __init__(
        self,
        way: Way,
        model: Path,
        arena: str,
        kv_tokens: int,
        capacity: str,
        tp: int,
        log: Path,
        *,
        quick: bool,
    ) -> None:
        self.way = way
        self._arena = arena if way == "arena" else None
        # Idle, it leaves the cores to the others.
        flags = ["--sleep-on-idle", f"--max-total-tokens={kv_tokens}", f"--tp-size={tp}"]
        if quick:
            layers = json.dumps({"num_hidden_layers": LAYERS})
            flags += ["--load-format=dummy", f"--json-model-override-args={layers}"]
            flags.append("--skip-server-warmup")
        if way == "native":
            flags.append("--enable-return-routed-experts")
        elif way == "arena":
            flags += [f"--shmroute-arena={arena}", f"--shmroute-capacity={capacity}"]
        env = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp)))} if tp > 1 else {}
        self._server = ServerProcess(
            model, *flags, env=env, log=log, timeout=START_SECONDS, cpu=not has_gpu()
        )
        self._random = np.random.default_rng(5)

    def launch(self) -> None:
        self._server.launch()

    def finish_start(self) -> None:
        """Wait until it serves, and have it make what it makes on first use."""
        self._server.finish_start()
        self.ask(2, 16)

    def close(self) -> None:
        """End it with everything that it left."""
        self._server.stop()
        if self._arena:
            shmroute.reap(self._arena, force=True)

    def ask(self, requests: int, tokens: int) -> list[str]:
        """Have it answer so many prompts of ``tokens``; what each response carries for routes."""
        carried = []
        for first in range(0, requests, AT_ONCE):
            count = min(AT_ONCE, requests - first)
            body = {
                "input_ids": self._random.integers(
                    FIRST_TOKEN, VOCABULARY, (count, tokens)
                ).tolist(),
                "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True},
                "return_routed_experts": self.way != "off",
            }
            answers = self._server.post("/generate", body)
            carried += [answer["meta_info"].get("routed_experts", "") for answer in answers]
        return carried

    def watch(self) -> MemoryWatch:
        """Watches the memory of its processes while something runs."""
        for pid in self._server.observe():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins anew
        return MemoryWatch(self._server.observe())

    def reading(self) -> Reading:
        roles: dict[str, dict[str, int]] = {}
        mapped: set[int] = set()
        for pid in sorted(self._server.observe()):
            found = engine_memory.of_process(pid)
            if "Uss" in found:
                roles[self._role(pid, found.pop("runs"), roles)] = found
            mapped |= inodes_in_use(pid)
        return Reading(
            roles,
            _shm_bytes(mapped),
            engine_memory.of_arena(self._arena) if self._arena else {},
            engine_memory.gpu_used_if_any(),
        )

    def _role(self, pid: int, runs: str, taken: dict[str, Any]) -> str:
        if pid == self._server.pid:
            return "HTTP server"
        role = next((name for name in ("scheduler", "detokenizer") if name in runs), "other")
        number = sum(name.startswith(role) for name in taken)
        return f"{role} {number}" if number else role


def _shm_bytes(inodes: set[int]) -> int:
    """Bytes of these files in shared memory, but for arenas."""
    files = [path for path in SHARED_MEMORY.iterdir() if not path.name.startswith("shmroute-")]
    found = 0
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # somebody else's, gone meanwhile
            status = path.stat()
            found += status.st_blocks * 512 if status.st_ino in inodes else 0
    return found
