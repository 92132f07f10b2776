"""The corpus of ``tests/attacks``: what a file describes, made into bytes.

See ``tests/attacks/README.md`` for the form.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest

from shmroute.layout import SlotRow, write_record
from shmroute.memory import ArenaMemory

CORPUS = Path(__file__).parents[1] / "attacks"
# The fields of what is forged, in their order.
TICKET = (
    *("boot_id", "host", "segment", "arena_id", "slot", "generation", "rid", "start", "tokens"),
    *("layers", "top_k", "dtype", "complete"),
)
INLINE = (
    *("rid", "start", "prompt_tokens", "experts", "top_k", "layers", "num_layers", "model"),
    *("metadata", "rows"),
)
METADATA = ("rid", "missing", "versions")


class Attack(NamedTuple):
    """One file of the corpus."""

    name: str
    says: str
    gets: str
    facts: dict[str, Any]


def corpus(folder: str) -> list[Any]:
    """Every attack of a folder, as parameters of a test."""
    return [pytest.param(_load(path), id=path.stem) for path in sorted((CORPUS / folder).iterdir())]


def _load(path: Path) -> Attack:
    facts = json.loads(path.read_text())
    assert facts.pop("why"), path
    return Attack(path.stem, facts.pop("says", ""), facts.pop("gets"), facts)


# -- values ------------------------------------------------------------------------------------


def value(described: Any) -> Any:
    """A JSON value as it is; an object is bytes or text that JSON cannot hold, or not shortly."""
    if isinstance(described, list):
        return [value(item) for item in described]
    if not isinstance(described, dict):
        return described
    (kind, content), *more = described.items()
    times = dict(more).get("times", 1)
    return {"hex": bytes.fromhex, "text": str, "list": list}[kind](content) * times


def packed(described: Any) -> bytes:
    """msgpack of a value; ``{"msgpack": hex}`` is msgpack already, of whatever kind."""
    if isinstance(described, dict) and "msgpack" in described:
        return bytes.fromhex(described["msgpack"]) * described.get("times", 1)
    if isinstance(described, list):
        return msgpack.Packer().pack_array_header(len(described)) + b"".join(map(packed, described))
    return msgpack.packb(value(described))


def pieces(described: list[Any]) -> bytes:
    """Bytes out of pieces that are written one behind the other."""
    return b"".join(value(piece) for piece in described)


# -- shared memory -----------------------------------------------------------------------------


def forge_header(data: memoryview, facts: dict[str, Any]) -> None:
    """Put what the attack says into the header of a mapped arena."""
    if "patch" in facts:
        at, forged = facts["patch"]["at"], value(facts["patch"]["bytes"])
    else:
        length = int.from_bytes(data[12:16], "little")
        fields = msgpack.unpackb(data[16 : 16 + length])
        entries = {name: msgpack.packb(own) for name, own in fields.items()}
        entries |= {name: packed(content) for name, content in facts["fields"].items()}
        blob = msgpack.Packer().pack_map_header(len(entries))
        blob += b"".join(msgpack.packb(name) + entry for name, entry in entries.items())
        at, forged = 12, len(blob).to_bytes(4, "little") + blob
    data[at : at + len(forged)] = forged


def forge_record(memory: ArenaMemory, slot: int, facts: dict[str, Any]) -> None:
    """Put what the attack says into a sealed record of a mapped arena."""
    row = memory.row(slot)
    if "metadata" in facts:
        at, forged = row.metadata_offset, _metadata(memory, row, facts["metadata"])
        memory.heap[at : at + len(forged)] = forged
        row = row._replace(metadata_bytes=len(forged))
    rows_end = row.extent_offset + row.tokens * memory.description.routes.row_bytes
    metadata_end = row.metadata_offset + row.metadata_bytes - row.extent_offset
    places = {"heap": len(memory.heap), "rows_end": rows_end, "metadata_end": metadata_end}
    for name, content in facts.get("row", {}).items():
        number = places[content[0]] + content[1] if isinstance(content, list) else content
        row = row._replace(**{name: number})
    write_record(memory.data, memory.slot_offset(slot), row)
    if "word" in facts:
        memory.words[slot] = facts["word"]
    if "hash" in facts:
        memory.hashes[slot] = facts["hash"]


def _metadata(memory: ArenaMemory, row: SlotRow, described: dict[str, Any]) -> bytes:
    if "bytes" in described:
        return pieces(described["bytes"])
    own = bytes(memory.heap[row.metadata_offset : row.metadata_offset + row.metadata_bytes])
    fields = dict(zip(METADATA, map(msgpack.packb, msgpack.unpackb(own)), strict=True))
    fields |= {name: packed(content) for name, content in described.items()}
    return b"\x93" + b"".join(fields.values())


# -- sources -----------------------------------------------------------------------------------


def source(facts: dict[str, Any], ticket: bytes, inline: bytes) -> Any:
    """What the attack hands to a reader, made of these two envelopes that are as they should be.

    Bytes come as base64, which is how a response carries them.
    """
    if "source" in facts:
        return _source_value(facts["source"])
    if "bytes" in facts:
        envelope = pieces(facts["bytes"])
    elif "inline" in facts:
        envelope = _forged(inline, INLINE, facts["inline"])
    else:
        envelope = _forged(ticket, TICKET, facts.get("ticket", {}), facts.get("envelope", {}))
    envelope = envelope[: len(envelope) - facts.get("cut", 0)] + pieces(facts.get("append", []))
    return {"routed_experts": base64.b64encode(envelope).decode()}


def _source_value(described: Any) -> Any:
    if isinstance(described, dict) and "text" in described:
        return value(described)
    return described


def _forged(
    envelope: bytes,
    names: Sequence[str],
    fields: dict[str, Any],
    outer: dict[str, Any] | None = None,
) -> bytes:
    """The envelope with some fields of its body, and of itself, replaced."""
    magic, version, kind, body, pad = msgpack.unpackb(envelope)
    said = [
        packed(fields[name]) if name in fields else msgpack.packb(own)
        for name, own in zip(names, body, strict=True)
    ]
    whole = {"magic": magic, "version": version, "kind": kind, "body": None, "pad": pad}
    parts = {name: msgpack.packb(own) for name, own in whole.items()}
    parts["body"] = msgpack.Packer().pack_array_header(len(said)) + b"".join(said)
    parts |= {name: packed(content) for name, content in (outer or {}).items()}
    return b"\x95" + b"".join(parts.values())


# -- files -------------------------------------------------------------------------------------


@contextlib.contextmanager
def forged_file(base: Path, facts: dict[str, Any]) -> Iterator[None]:
    """Put what the attack says in the place of one of an arena's files, and the file back."""
    path = base.with_name(
        base.name + {"data": "", "control": ".ctl", "lease": ".L000"}[facts["file"]]
    )
    status = path.stat()
    if "owner" in facts:
        os.chown(path, facts["owner"], -1)
    if "mode" in facts:
        path.chmod(int(facts["mode"], 8))
    moved = path.rename(path.with_name(path.name + ".moved")) if "becomes" in facts else path
    try:
        if "becomes" in facts:
            _put(path, moved, facts["becomes"])
        yield
    finally:
        if moved != path:
            _take_away(path)
            moved.rename(path)
        os.chown(path, status.st_uid, -1)
        path.chmod(stat.S_IMODE(status.st_mode))


def _put(path: Path, moved: Path, becomes: dict[str, Any]) -> None:
    match becomes:
        case {"link": target}:
            path.symlink_to({"moved": moved, "itself": path}.get(target, target))
        case {"size": size}:
            path.touch(0o600)
            with path.open("r+b") as copy, moved.open("rb") as whole:
                copy.write(whole.read(min(size, os.fstat(whole.fileno()).st_size)))
                copy.truncate(size)
        case {"kind": "directory"}:
            path.mkdir()
        case {"kind": "fifo"}:
            os.mkfifo(path)
        case {"kind": "socket"}:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(path))
        case {"kind": "nothing"}:
            return


def _take_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
