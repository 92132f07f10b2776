"""The envelope that travels in a response: a ticket, or the rows themselves.

Form
    msgpack ``["shmr", version, kind, body, pad]``. ``kind`` 0 is a ticket (where the
    record lies; at most 256 bytes for rids up to 64), 1 an inline record (the rows are in
    it), 2 says why there are no rows. The pad makes the length no multiple of 4, so that
    a client which still decodes int32 fails loudly instead of training on ticket bytes.

Tickets are untrusted input: every field's type and range is checked here, and the reader
checks the record against the ticket again. Nothing is unpickled. No list may claim more items
than a model may have layers: before 1.2, msgpack sets aside what nested lists claim, and 1 MB of
them took it 5 s and 17 GB.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import msgpack
import numpy as np
import numpy.typing as npt

from .errors import InvalidTicket, RouteFailed
from .layout import MAX_LAYERS, MAX_SLOTS, MAX_TOKENS, RouteLayout
from .metadata import Metadata
from .segments import SegmentName, parse_segment

_MAGIC = "shmr"
_VERSION = 1
_TICKET, _INLINE, _FAILED = 0, 1, 2
# What base64 makes of the envelope's first six bytes: tells a ticket's text from a rid.
_TEXT_PREFIX = base64.b64encode(b"\x95\xa4shmr").decode()
_HOST_BYTES = 27
_SEGMENT_NAME_MAX = 128  # more than any segment's name has
RID_BYTES_MAX = 4096
_REASON_MAX = 400
_FIELDS_OF_A_RECORD = 6
_TICKET_FIELDS, _START_FIELD, _TOKENS_FIELD = 13, 7, 8
_PACKED_COMPLETE = {complete: msgpack.packb(complete) for complete in (None, False, True)}
_NO_PAD, _PAD = msgpack.packb(b""), msgpack.packb(b"\0")
_DTYPES = {"uint8": 1, "uint16": 2}
_DTYPE_NAMES = {number: dtype for dtype, number in _DTYPES.items()}

_Decoded = TypeVar("_Decoded")


class Ticket(NamedTuple):
    """Where one record lies. Opaque to users; all fields are as issued, none is trusted.

    A named tuple, since a batch decodes as many as it has records before anything is copied,
    and a frozen dataclass of twelve fields takes 2 us.
    """

    boot_id: str
    host: str
    segment: SegmentName
    slot: int
    generation: int
    rid: str
    start: int
    tokens: int
    layers: int
    top_k: int
    dtype: str
    complete: bool | None  # None: the ticket left before the record was sealed

    def encode(self) -> bytes:
        """The envelope: at most 256 bytes for a rid of up to 64."""
        arena = _tickets_of(
            self.boot_id, self.host, self.segment, self.layers, self.top_k, self.dtype
        )
        return arena.encode(
            self.slot, self.generation, self.rid, self.start, self.tokens, self.complete
        )


def _packing(packer: msgpack.Packer) -> Callable[[Any], bytes]:
    """A packer's ``pack`` where several threads and signal handlers may call it, else ``packb``.

    Kept, since a new packer for each ticket takes 256 KB for its buffer. A call of msgpack's
    extension is one step of the interpreter. What msgpack is without it, is Python: two calls at
    once would mix their bytes, and a ticket could name another's slot.
    """
    alone = type(packer).__module__.endswith("_cmsgpack")
    return packer.pack if alone else msgpack.packb


class ArenaTickets:
    """Makes the tickets of one arena: what all of them say is packed once.

    An engine's scheduler thread makes a ticket for each request, and two thirds of its fields
    are the arena's. msgpack puts a list's length before its items and nothing behind them, so
    the packed pieces only need to follow each other.
    """

    def __init__(
        self, boot_id: str, host: str, segment: SegmentName, layers: int, top_k: int, dtype: str
    ) -> None:
        pack = msgpack.Packer()
        before = [
            bytes.fromhex(boot_id.replace("-", "")),
            host.encode()[:_HOST_BYTES],
            segment.base,
            segment.arena_id,
        ]
        behind = [layers, top_k, _DTYPES[dtype]]
        fields = len(before) + _FIELDS_OF_A_RECORD + len(behind)
        self._before = b"".join(
            [
                pack.pack_array_header(5),
                *map(pack.pack, [_MAGIC, _VERSION, _TICKET]),
                pack.pack_array_header(fields),
                *map(pack.pack, before),
            ]
        )
        self._behind = b"".join(map(pack.pack, behind))
        self._pack = _packing(pack)

    def encode(
        self,
        slot: int,
        generation: int,
        rid: str,
        start: int,
        tokens: int,
        complete: bool | None,
    ) -> bytes:
        """The envelope of one record's ticket."""
        # Without the first byte, which says that it is a list of five.
        record: bytes = self._pack((slot, generation, rid, start, tokens))[1:]
        envelope = self._before + record + self._behind + _PACKED_COMPLETE[complete] + _NO_PAD
        if len(envelope) % 4 == 0:
            return envelope[: -len(_NO_PAD)] + _PAD
        return envelope


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class InlineRecord:
    """A record that travels in the response itself.

    ``rows`` is read-only, ``[tokens, moe_layers, top_k]``, of the layout's dtype.
    """

    rid: str
    start: int
    prompt_tokens: int
    routes: RouteLayout
    metadata: Metadata
    rows: npt.NDArray[Any]

    @property
    def tokens(self) -> int:
        return len(self.rows)

    def encode(self) -> bytes:
        """The envelope with the rows in it."""
        layout = self.routes
        if self.rows.shape[1:] != layout.row_shape:
            raise ValueError(
                f"rows of shape {self.rows.shape} are not [tokens, *{layout.row_shape}]"
            )
        self.metadata.check(self.tokens)
        flat = np.ascontiguousarray(self.rows, dtype=layout.dtype).reshape(-1)
        return _envelope(
            _INLINE,
            [
                self.rid,
                self.start,
                self.prompt_tokens,
                layout.num_experts,
                layout.top_k,
                list(layout.layer_ids),
                layout.num_layers,
                layout.model,
                self.metadata.pack(self.tokens),
                flat.view(np.uint8).data,
            ],
        )


def _envelope(kind: int, body: list[Any]) -> bytes:
    packed: bytes = msgpack.packb([_MAGIC, _VERSION, kind, body, b""])
    if len(packed) % 4 == 0:
        packed = msgpack.packb([_MAGIC, _VERSION, kind, body, b"\0"])
    return packed


def failed_ticket(rid: str, reason: str) -> bytes:
    """An envelope for a request whose routes could not be kept; readers get ``RouteFailed``."""
    return _envelope(_FAILED, [rid, reason[:_REASON_MAX]])


@dataclasses.dataclass(slots=True)
class SkimmedTicket:
    """A ticket of which nothing but the place of its rows among a sequence's is checked.

    A batch needs that of all its tickets before it begins to copy. Checking the rest takes
    longer, and is done while the record before is copied. (Of three fields, this is made in half
    of a named tuple's time.)
    """

    start: int
    tokens: int
    body: Any

    def ticket(self) -> Ticket:
        """Check the rest."""
        return _checked(_decode_ticket, self.body)


def decode(envelope: bytes | bytearray | memoryview) -> Ticket | InlineRecord:
    """Decode an envelope.

    Raises
    ------
    InvalidTicket
        It is truncated, of another version, or a field has a type or value it cannot have.
    RouteFailed
        The engine says in it why it kept no routes.
    """
    found = _skim(envelope)
    return found.ticket() if isinstance(found, SkimmedTicket) else found


def _skim(envelope: bytes | bytearray | memoryview) -> SkimmedTicket | InlineRecord:
    try:
        fields = msgpack.unpackb(envelope, max_array_len=MAX_LAYERS, max_map_len=0, max_ext_len=0)
        magic, version, kind, body, _pad = fields
    except Exception as error:  # msgpack raises a dozen types for garbage
        raise InvalidTicket(
            f"these {len(envelope)} bytes are no shmroute ticket ({type(error).__name__}: {error})"
            "; from an engine without --shmroute-arena they are SGLang's own rows"
        ) from error
    if magic != _MAGIC:
        raise InvalidTicket(f"these {len(envelope)} bytes are no shmroute ticket: no mark")
    if version != _VERSION:
        raise InvalidTicket(
            f"ticket version {version!r:.40}, this shmroute reads {_VERSION}: install the same "
            "shmroute release in the engine and the trainer"
        )
    if kind == _TICKET:
        return _skimmed(body)
    if kind == _INLINE:
        return _checked(_decode_inline, body)
    if kind == _FAILED:
        raise _checked(_failure, body)
    raise InvalidTicket(f"ticket of unknown kind {kind!r:.40}")


def _checked(decoded: Callable[[Any], _Decoded], body: Any) -> _Decoded:
    try:
        return decoded(body)
    except InvalidTicket:
        raise
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise InvalidTicket(f"a ticket with impossible fields: {error}") from error


def _skimmed(body: Any) -> SkimmedTicket:
    if len(_typed(body, list, "body")) != _TICKET_FIELDS:
        raise InvalidTicket(f"a ticket of {len(body)} fields, not {_TICKET_FIELDS}")
    return SkimmedTicket(
        _bounded(body[_START_FIELD], 0, MAX_TOKENS, "start"),
        _bounded(body[_TOKENS_FIELD], 1, MAX_TOKENS, "tokens"),
        body,
    )


def _failure(body: Any) -> RouteFailed:
    rid, reason = body
    why = _typed(reason, str, "reason")[:_REASON_MAX]
    return RouteFailed(f"rid {_rid(rid)!r}: the engine kept no routes: {why}")


def _decode_ticket(body: Any) -> Ticket:
    boot, host, name, arena_id, slot, generation, rid, start, tokens, layers, top_k, code, done = (
        body
    )
    boot_id, segment, dtype = _issuer(boot, name, arena_id, layers, top_k, code)
    if done is not None and type(done) is not bool:
        raise InvalidTicket(f"the ticket's complete is {done!r:.40}")
    if _bounded(generation, 2, (1 << 64) - 2, "generation") % 2:
        raise InvalidTicket(f"the ticket's generation {generation} is odd")
    return Ticket(
        boot_id,
        _typed(host, bytes, "host")[:_HOST_BYTES].decode("utf-8", "replace"),
        segment,
        _bounded(slot, 0, MAX_SLOTS - 1, "slot"),
        generation,
        _rid(rid),
        _bounded(start, 0, MAX_TOKENS, "start"),
        _bounded(tokens, 1, MAX_TOKENS, "tokens"),
        layers,
        top_k,
        dtype,
        done,
    )


# ``typed``, since equal keys are one entry and 1 == True == 1.0.
@lru_cache(maxsize=64, typed=True)
def _issuer(
    boot: Any, name: Any, arena_id: Any, layers: Any, top_k: Any, code: Any
) -> tuple[str, SegmentName, str]:
    """Check what all tickets of an arena say; boot id, segment and dtype of it."""
    segment = parse_segment(_typed(name, str, "segment")[:_SEGMENT_NAME_MAX])
    if segment is None or segment.temporary or segment.arena_id != arena_id:
        raise InvalidTicket(f"the ticket names no arena segment: {name!r:.120}")
    if len(_typed(boot, bytes, "boot id")) != 16:
        raise InvalidTicket(f"the ticket's boot id has {len(boot)} bytes")
    _bounded(layers, 1, MAX_LAYERS, "layers")
    _bounded(top_k, 1, 256, "top_k")
    text = boot.hex()
    return (
        "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])),
        segment,
        _DTYPE_NAMES[_bounded(code, 1, 2, "dtype")],
    )


def _decode_inline(body: Any) -> InlineRecord:
    rid, start, prompt, experts, top_k, layers, num_layers, model, metadata, rows = body
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise InvalidTicket("the inline record's layers are no list of layer numbers")
    routes = RouteLayout(
        _bounded(experts, 1, 65536, "num_experts"),
        _bounded(top_k, 1, 256, "top_k"),
        [_bounded(layer, 0, 1 << 20, "layer") for layer in layers],
        model=_typed(model, str, "model"),
        num_layers=_bounded(num_layers, 1, 1 << 20, "num_layers"),
    )
    rows = _typed(rows, bytes, "rows")
    if len(rows) % routes.row_bytes:
        raise InvalidTicket(
            f"the inline record has {len(rows)} bytes of rows, no multiple of {routes.row_bytes}"
        )
    tokens = len(rows) // routes.row_bytes
    return InlineRecord(
        rid=_rid(rid),
        start=_bounded(start, 0, MAX_TOKENS, "start"),
        prompt_tokens=_bounded(prompt, 0, MAX_TOKENS, "prompt tokens"),
        routes=routes,
        metadata=Metadata.unpack(_typed(metadata, bytes, "metadata"), tokens),
        rows=np.frombuffer(rows, dtype=routes.dtype).reshape(tokens, *routes.row_shape),
    )


@lru_cache(maxsize=64)
def _tickets_of(
    boot_id: str, host: str, segment: SegmentName, layers: int, top_k: int, dtype: str
) -> ArenaTickets:
    """``ArenaTickets`` for the few arenas that a reader encodes tickets of."""
    return ArenaTickets(boot_id, host, segment, layers, top_k, dtype)


def _typed(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise InvalidTicket(f"the ticket's {what} is a {type(value).__name__}")
    return value


def _bounded(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise InvalidTicket(f"the ticket's {what} is {value!r:.40}, not within [{low}, {high}]")
    return value


def _rid(rid: Any) -> str:
    if len(_typed(rid, str, "rid")) > RID_BYTES_MAX:
        raise InvalidTicket(f"the ticket's rid has {len(rid)} characters")
    text: str = rid
    return text


# Not unions, which Python would make anew for each source.
_ENVELOPE_TYPES = (bytes, bytearray, memoryview)
_DECODED_TYPES = (Ticket, InlineRecord)


def looks_like_ticket(text: str) -> bool:
    """Whether a reader takes this text for a ticket and not for a rid."""
    return text.startswith(_TEXT_PREFIX)


def parse_source(source: Any) -> Ticket | InlineRecord | str:
    """What a user may hand to a reader: a rid, a ticket (bytes or base64 text), a response.

    A response is SGLang's output with ``meta_info``, a ``meta_info`` by itself, an OpenAI
    response with ``sglext``, or ``sglext`` by itself.
    """
    found = skim_source(source)
    return found.ticket() if isinstance(found, SkimmedTicket) else found


def skim_source(source: Any) -> SkimmedTicket | Ticket | InlineRecord | str:
    """``parse_source`` without the check of a ticket's fields."""
    if isinstance(source, _ENVELOPE_TYPES):
        return _skim(source)
    if isinstance(source, _DECODED_TYPES):
        return source
    if isinstance(source, str):
        if looks_like_ticket(source):
            return _skim_text(source)
        if len(source) > RID_BYTES_MAX:
            raise InvalidTicket(
                f"a text of {len(source)} characters is neither a rid nor a ticket; are these "
                "SGLang's native routes (int32 in base64)?"
            )
        return source
    if isinstance(source, Mapping):
        return _skim_text(_carried(source))
    raise InvalidTicket(f"a {type(source).__name__} is no rid, ticket or response")


def _carried(response: Mapping[str, Any]) -> str:
    inner = response.get("meta_info") or response.get("sglext") or response
    text = inner.get("routed_experts") if isinstance(inner, Mapping) else None
    if not isinstance(text, str):
        raise InvalidTicket(
            f"the response carries no routed_experts (keys: {sorted(map(str, response))[:12]}): "
            "send the request with return_routed_experts=True to an engine that has an arena "
            "(--shmroute-arena), and read a stream's last chunk"
        )
    return text


def _skim_text(text: str) -> SkimmedTicket | InlineRecord:
    try:
        envelope = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidTicket(
            f"routed_experts holds no base64 of a ticket ({error}): {text[:24]!r}"
        ) from error
    return _skim(envelope)
