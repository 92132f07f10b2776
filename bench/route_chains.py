"""Two ways of a finished request's rows to the trainer: SGLang's own, and the arena's.

Both go through the same ``through_sglang``; natively its payload is the rows, with the arena it
is the ticket. ``store.py`` times them and says what the figures mean.
"""

from __future__ import annotations

import base64
import functools
import importlib
import json
import pickle
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

import shmroute

LAYERS, TOP_K, EXPERTS = 48, 8, 128
ROUTES = shmroute.RouteLayout(EXPERTS, TOP_K, range(LAYERS), model="Qwen/Qwen3-30B-A3B")
KV_TOKENS = 131_072

Array = npt.NDArray[Any]
Times = list[int]


def new_rid() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Codec:
    """base64 and JSON: what SGLang uses, or the standard library's."""

    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes]
    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]


SGLANG = Codec(pybase64.b64encode, pybase64.b64decode, orjson.dumps, orjson.loads)
STANDARD = Codec(
    base64.b64encode, base64.b64decode, lambda value: json.dumps(value).encode(), json.loads
)


@dataclass(slots=True)
class Steps:
    """Nanoseconds of every step of a chain, run by run."""

    times: dict[str, Times] = field(default_factory=dict)

    def __call__(self, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter_ns()
        result = step(*arguments)
        self.times.setdefault(name, []).append(time.perf_counter_ns() - started)
        return result

    def totals(self, leave_out: str = "") -> Times:
        """Nanoseconds of every run, all steps but ``leave_out`` together."""
        counted = [times for name, times in self.times.items() if name != leave_out]
        return [sum(run) for run in zip(*counted, strict=True)]

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    @property
    def total(self) -> float:
        return statistics.median(self.totals())

    def without(self, name: str) -> float:
        return statistics.median(self.totals(leave_out=name))


@dataclass(frozen=True, slots=True)
class Finished:
    """A request whose rows are finished; ``copy_into`` brings them into its record."""

    tokens: int
    copy_into: Callable[[Array], Any]


class RouteTables:
    """The same routes by KV location twice: int32 as SGLang holds them, uint8 as shmroute does."""

    def __init__(self, kv_tokens: int = KV_TOKENS) -> None:
        self._random = np.random.default_rng(0)
        self._kv_tokens = kv_tokens
        shape = (kv_tokens, LAYERS, TOP_K)
        self.compact: Array = self._random.integers(0, EXPERTS, shape, dtype=np.uint8)
        self._int32: Any = as_tensor(self.compact.astype(np.int32))

    def scattered(self, tokens: int) -> Array:
        """KV locations of a request, as scattered as they can be."""
        return self._random.choice(self._kv_tokens, tokens, replace=False)

    def gather_int32(self, locations: Any) -> Any:
        """SGLang's gather, with its tensors where torch is installed."""
        return self._int32[locations]

    def staged(self, lap: int, tokens: int) -> Finished:
        """Rows that lie together, as the GPU's gather leaves them in staging."""
        first = lap % (self._kv_tokens // tokens) * tokens
        return Finished(tokens, lambda rows: np.copyto(rows, self.compact[first : first + tokens]))

    def unstaged(self, locations: Array) -> Finished:
        """Rows that lie at scattered KV locations, to be gathered by the CPU."""
        return Finished(
            len(locations),
            lambda rows: np.take(self.compact, locations, axis=0, out=rows, mode="clip"),
        )


def as_tensor(array: Array) -> Any:
    """The array as SGLang has it: a tensor, where torch is installed."""
    torch = _torch()
    return array if torch is None else torch.from_numpy(array)


@functools.cache
def _torch() -> Any:
    """Torch where it is installed; it takes seconds to import, and not every user needs it."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def response_with(routes: str | None, rid: str = "0" * 32) -> dict[str, Any]:
    """A response of ``/generate`` as SGLang fills it."""
    carried = {} if routes is None else {"routed_experts": routes}
    meta_info = {
        "id": rid,
        "finish_reason": {"type": "length", "length": 256},
        "prompt_tokens": 7_936,
        "weight_version": "default",
        "completion_tokens": 256,
        "cached_tokens": 0,
        "e2e_latency": 4.25,
    }
    return {"text": " and so on" * 200, "meta_info": meta_info | carried}


def through_sglang(payload: Any, rid: str, codec: Codec, step: Steps) -> Mapping[str, Any]:
    """Scheduler to detokenizer to tokenizer to client: the way of ``req.routed_experts``."""

    def encode(rows: Any) -> str:
        return codec.encode(np.asarray(rows).tobytes()).decode()

    message = step("pickle", pickle.dumps, ("BatchTokenIDOutput", [rid], [payload]), 5)
    _, _, (received,) = step("unpickle", pickle.loads, message)
    text = step("base64 encode", encode, received)
    message = step("pickle text", pickle.dumps, ("BatchStrOutput", [rid], [text]), 5)
    _, _, (text,) = step("unpickle text", pickle.loads, message)
    body = step("JSON dumps", codec.dumps, response_with(text, rid))
    parsed: Mapping[str, Any] = step("JSON loads", codec.loads, body)
    return parsed


def native_view(tables: RouteTables, locations: Array, codec: Codec, step: Steps) -> Array:
    """Rows natively: gather, the way through SGLang, decode."""

    def decode(response: Mapping[str, Any]) -> Array:
        text = response["meta_info"]["routed_experts"].encode()
        return np.frombuffer(codec.decode(text), np.int32).reshape(-1, LAYERS, TOP_K)

    rows = step("gather", tables.gather_int32, as_tensor(locations))
    response = through_sglang(rows, new_rid(), codec, step)
    view: Array = step("base64 decode, view", decode, response)
    return view


def arena_view(
    arena: shmroute.Arena, request: Finished, codec: Codec, step: Steps
) -> tuple[Array, bytes]:
    """Rows through the arena: reserve, copy, seal, the ticket's way through SGLang, open."""

    def issue(record: Any) -> Any:
        return as_tensor(np.frombuffer(bytearray(record.ticket), np.uint8))

    def view_of(response: Mapping[str, Any]) -> Array:
        with shmroute.ShmRouteReader(response) as routes:
            return routes.numpy()

    rid = new_rid()
    record = step("reserve", lambda: arena.reserve(rid, tokens=request.tokens))
    step("copy", request.copy_into, record.rows)
    step("seal", record.seal)
    ticket = step("ticket", issue, record)
    response = through_sglang(ticket, rid, codec, step)
    view: Array = step("open, view", view_of, response)
    return view, record.ticket
