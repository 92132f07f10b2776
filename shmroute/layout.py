"""The bytes of an arena, and the only module that knows where they are.

Problem
    A writer and many readers, in processes of different Python versions that share
    nothing but a name, must agree on every offset; and a reader must be able to refuse
    a segment that is damaged, foreign or of another version before it follows an offset.

Data segment (writer read-write, readers read-only)::

    0        magic               8 B   written last
    8        layout version      u32   must match exactly
    12       description length  u32
    16       description         msgpack: routes, geometry, writer (see ``ArenaDescription``)
    8192     counters            u64[4][256], one bank a counting side (see ``counters``)
    16384    state words         u64[slots]
             rid hashes          u64[slots]
             slot rows           192 B each, see ``_SLOT``
             record heap         page-aligned; extents aligned to 64 B

    extent = rows[tokens, moe_layers, top_k] | pad to 64 | metadata (msgpack)

Control segment (the only thing a reader can write)::

    0        acknowledgements    u64[slots]

State word of a slot::

    0                free
    odd              being written; ``word - 1`` is the generation
    even, not zero   sealed; the word is the generation

Everything that comes out of a segment is untrusted: sizes are capped and offsets are
checked against the segment before anything is made of them.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgpack
import numpy as np

from .errors import LayoutMismatch

MAGIC = b"SHMROUTE"
LAYOUT_VERSION = 1

PAGE = 4096
EXTENT_ALIGN = 64
MAX_SLOTS = 1 << 20
MAX_LAYERS = 4096
MAX_TOKENS = 1 << 31
# More than any record's metadata beside its bit a row: a rid of 4096 characters, weight runs.
MAX_METADATA = 32768

_PREFIX = struct.Struct("<8sII")
_COUNTER_OFFSET = 8192
HEADER_BYTES = _COUNTER_OFFSET
_DESCRIPTION_MAX = _COUNTER_OFFSET - _PREFIX.size
COUNTER_BANKS = 4
COUNTERS_PER_BANK = 256
_TABLE_OFFSET = _COUNTER_OFFSET + COUNTER_BANKS * COUNTERS_PER_BANK * 8

# generation, extent offset, extent bytes, metadata offset, sealed at (CLOCK_BOOTTIME ns),
# tokens, start, prompt tokens, missing rows, metadata bytes, flags, checksum,
# and apart from them, since it outlives the slot's next records: failed generation, when
# (CLOCK_BOOTTIME ns), reason.
_SLOT = struct.Struct("<QQQQQ IIII IIQ QQ 104s")
SLOT_ROW_BYTES = _SLOT.size
# What the tables take: a fixed part (header, alignment) and a part for each slot.
MIN_TABLE_BYTES = _TABLE_OFFSET + EXTENT_ALIGN
SLOT_BYTES = 16 + SLOT_ROW_BYTES
_RECORD_FIELDS = struct.Struct("<QQQQQ IIII IIQ")
_FAILURE_FIELDS = struct.Struct("<QQ104s")
_FAILURE_OFFSET = _RECORD_FIELDS.size
_REASON_BYTES = 104

FLAG_CHECKSUM = 1

_MAX_TICKS = 1 << 40  # of a process's start after the boot: 350 years


def align(size: int, to: int = EXTENT_ALIGN) -> int:
    """Round ``size`` up to a multiple of ``to`` (a power of two)."""
    return (size + to - 1) & -to


@dataclasses.dataclass(frozen=True, slots=True)
class RouteLayout:
    """What one row of routes means.

    Parameters
    ----------
    num_experts
        Logical routed experts a layer has. Ids are in ``[0, num_experts)``; rows are
        ``uint8`` up to 256 experts, ``uint16`` above.
    top_k
        Experts chosen per token and layer; shared experts are not counted.
    layer_ids
        Global 0-based decoder-layer numbers of the MoE layers, in row order.
    model
        The model's name, for people.
    num_layers
        All decoder layers, dense ones included (the native shape). Default: up to the
        last MoE layer.
    """

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    model: str = ""
    num_layers: int = 0

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        layer_ids: Iterable[int],
        model: str = "",
        num_layers: int | None = None,
    ) -> None:
        layers = tuple(int(i) for i in layer_ids)
        object.__setattr__(self, "num_experts", int(num_experts))
        object.__setattr__(self, "top_k", int(top_k))
        object.__setattr__(self, "layer_ids", layers)
        object.__setattr__(self, "model", str(model)[:256])
        object.__setattr__(self, "num_layers", int(num_layers or (layers[-1] + 1 if layers else 0)))
        self._check()

    def _check(self) -> None:
        if not 1 <= self.num_experts <= 65536:
            raise ValueError(f"num_experts is {self.num_experts}; 1 to 65536 fit uint8 and uint16")
        if not 1 <= self.top_k <= min(self.num_experts, 256):
            raise ValueError(f"top_k is {self.top_k} with {self.num_experts} experts")
        if not 1 <= len(self.layer_ids) <= MAX_LAYERS:
            raise ValueError(f"{len(self.layer_ids)} MoE layers; 1 to {MAX_LAYERS} are allowed")
        ascending = all(a < b for a, b in zip(self.layer_ids, self.layer_ids[1:], strict=False))
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers is {self.num_layers}; up to {MAX_LAYERS} are allowed")
        if self.layer_ids[0] < 0 or not ascending or self.layer_ids[-1] >= self.num_layers:
            raise ValueError(
                f"layer_ids must ascend within [0, {self.num_layers}): {self.layer_ids}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """``uint8`` when every id fits, else ``uint16``."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)

    @property
    def dtype_name(self) -> str:
        """``dtype.name``, which NumPy takes 4 us to put together."""
        return "uint8" if self.num_experts <= 256 else "uint16"

    @property
    def row_shape(self) -> tuple[int, int]:
        """``(moe_layers, top_k)``."""
        return len(self.layer_ids), self.top_k

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's routes."""
        # Not ``dtype.itemsize``, which makes a dtype each time: every reserve asks.
        return len(self.layer_ids) * self.top_k * (1 if self.num_experts <= 256 else 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Writer:
    """Who made an arena: for people and for the ticket's node check, never for liveness."""

    pid: int
    start_time: int
    boot_id: str
    host: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaDescription:
    """The header of an arena; every offset follows from it."""

    arena_id: bytes
    routes: RouteLayout
    slots: int
    capacity: int
    retention: float
    created_ns: int
    writer: Writer

    @property
    def hash_offset(self) -> int:
        return _TABLE_OFFSET + 8 * self.slots

    @property
    def rows_offset(self) -> int:
        return align(self.hash_offset + 8 * self.slots)

    @property
    def heap_offset(self) -> int:
        return align(self.rows_offset + SLOT_ROW_BYTES * self.slots, PAGE)

    @property
    def heap_bytes(self) -> int:
        return self.capacity - self.heap_offset

    @property
    def words_offset(self) -> int:
        return _TABLE_OFFSET

    @property
    def counters_offset(self) -> int:
        return _COUNTER_OFFSET

    @property
    def control_bytes(self) -> int:
        return 8 * self.slots

    def slot_offset(self, slot: int) -> int:
        return self.rows_offset + SLOT_ROW_BYTES * slot


class SlotRow(NamedTuple):
    """The fixed-size part of a record; offsets count from the start of the heap."""

    generation: int
    extent_offset: int
    extent_bytes: int
    metadata_offset: int
    sealed_ns: int
    tokens: int
    start: int
    prompt_tokens: int
    missing_rows: int
    metadata_bytes: int
    flags: int
    checksum: int


class ExtentPlan(NamedTuple):
    """How many bytes a record takes, and where its metadata begins."""

    rows_bytes: int
    metadata_offset: int
    total_bytes: int

    @property
    def metadata_capacity(self) -> int:
        return self.total_bytes - self.metadata_offset


def plan_extent(row_bytes: int, rid_bytes: int, tokens: int) -> ExtentPlan:
    """Size a record's extent before its metadata is known.

    The room for metadata holds the rid, one bit a row (which rows are missing) and the
    runs of weight versions; it stays under 2% of the rows of any record above 64 KB.
    """
    rows = tokens * row_bytes
    metadata = rid_bytes + 128 + (tokens + 7) // 8 + min(rows // 128, 4096)
    # ``align``, twice, without its calls.
    metadata_offset = rows + -rows % EXTENT_ALIGN
    return ExtentPlan(rows, metadata_offset, metadata_offset + metadata + -metadata % EXTENT_ALIGN)


def initialise(fd: int, description: ArenaDescription) -> None:
    """Write the header of a new segment, its magic last; everything else is zero already."""
    blob = _pack_description(description)
    os.pwrite(fd, _PREFIX.pack(b"\0" * len(MAGIC), LAYOUT_VERSION, len(blob)) + blob, 0)
    os.pwrite(fd, MAGIC, 0)


def read_header(segment: bytes | memoryview, size: int, name: str) -> ArenaDescription:
    """Parse and check the header at the beginning of ``segment``, which has ``size`` bytes in all.

    Works on one copy of the bytes, so that a header that changes underneath cannot pass
    a check with one value and be used with another.

    Raises
    ------
    LayoutMismatch
        Not an arena, another layout version, or a geometry that ``size`` cannot hold.
    """
    if size < _TABLE_OFFSET or len(segment) < _COUNTER_OFFSET:
        raise LayoutMismatch(f"{name} is no shmroute arena: {size} bytes, too short for a header")
    head = bytes(segment[:_COUNTER_OFFSET])
    magic, version, length = _PREFIX.unpack_from(head)
    if magic != MAGIC:
        raise LayoutMismatch(f"{name} is no shmroute arena: its first bytes are {magic!r}")
    if version != LAYOUT_VERSION:
        raise LayoutMismatch(
            f"{name} has layout version {version}, this shmroute reads version {LAYOUT_VERSION}: "
            "install the same shmroute release in the engine and the trainer"
        )
    if length > _DESCRIPTION_MAX:
        raise LayoutMismatch(f"{name}: the header claims a description of {length} bytes")
    try:
        description = _unpack_description(head[_PREFIX.size : _PREFIX.size + length])
    except (ArithmeticError, LookupError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise LayoutMismatch(f"{name}: the header cannot be read: {error}") from error
    if not 1 <= description.slots <= MAX_SLOTS or description.heap_bytes < 1:
        raise LayoutMismatch(
            f"{name}: {description.slots} slots do not fit a capacity of "
            f"{description.capacity} bytes"
        )
    if description.capacity > size:
        raise LayoutMismatch(
            f"{name}: the header claims {description.capacity} bytes, the segment has {size}"
        )
    return description


def write_record(segment: memoryview, offset: int, row: SlotRow) -> None:
    """Write a record's fixed fields; the caller holds the slot's exclusive lease."""
    segment[offset : offset + _RECORD_FIELDS.size] = _RECORD_FIELDS.pack(*row)


def read_record(segment: memoryview, offset: int) -> SlotRow:
    """Read a record's fixed fields; the caller holds a lease and checks what it uses."""
    return SlotRow._make(_RECORD_FIELDS.unpack_from(segment, offset))


class Failure(NamedTuple):
    """The last generation of a slot that failed (0: none), when, and why."""

    generation: int
    failed_ns: int
    reason: str


def write_failure(segment: memoryview, offset: int, failure: Failure) -> None:
    """Leave word of a failed generation; later records of the slot do not touch it."""
    text = failure.reason.encode("utf-8", "replace")[: _REASON_BYTES - 1]
    at = offset + _FAILURE_OFFSET
    fields = _FAILURE_FIELDS.pack(failure.generation, failure.failed_ns, text)
    segment[at : at + _FAILURE_FIELDS.size] = fields


def read_failure(segment: memoryview, offset: int) -> Failure:
    """The slot's last failure."""
    generation, when, text = _FAILURE_FIELDS.unpack_from(segment, offset + _FAILURE_OFFSET)
    return Failure(generation, when, text.rstrip(b"\0").decode("utf-8", "replace"))


def _pack_description(description: ArenaDescription) -> bytes:
    routes, writer = description.routes, description.writer
    blob: bytes = msgpack.packb(
        {
            "id": description.arena_id,
            "experts": routes.num_experts,
            "top_k": routes.top_k,
            "layers": list(routes.layer_ids),
            "num_layers": routes.num_layers,
            "model": routes.model,
            "slots": description.slots,
            "capacity": description.capacity,
            "retention": description.retention,
            "created_ns": description.created_ns,
            "writer": [writer.pid, writer.start_time, writer.boot_id, writer.host],
        }
    )
    if len(blob) > _DESCRIPTION_MAX:
        raise ValueError(f"the description takes {len(blob)} bytes of {_DESCRIPTION_MAX}")
    return blob


def _unpack_description(blob: bytes) -> ArenaDescription:
    fields = msgpack.unpackb(blob, max_array_len=MAX_LAYERS, max_map_len=32)
    if not isinstance(fields, dict):
        raise ValueError("it is not a map")
    pid, start_time, boot_id, host = fields["writer"]
    if len(bytes.fromhex(str(boot_id).replace("-", ""))) != 16:
        raise ValueError(f"its boot id is {boot_id!r:.60}")
    if not 0 <= start_time < _MAX_TICKS:
        raise ValueError(f"its writer started {start_time!r:.40} ticks after the boot")
    return ArenaDescription(
        arena_id=b"".join([fields["id"]]),  # bytes(n) would make n zeros
        routes=RouteLayout(
            fields["experts"],
            fields["top_k"],
            fields["layers"],
            model=fields["model"],
            num_layers=fields["num_layers"],
        ),
        slots=int(fields["slots"]),
        capacity=int(fields["capacity"]),
        retention=float(fields["retention"]),
        created_ns=int(fields["created_ns"]),
        writer=Writer(int(pid), int(start_time), str(boot_id), str(host)),
    )
