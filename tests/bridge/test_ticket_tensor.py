"""A ticket crosses SGLang's processes as what they take: a ``uint8`` tensor, or base64 of one."""

from __future__ import annotations

import base64
import pickle
import typing
from types import SimpleNamespace
from typing import Any

import msgspec
import orjson
import pytest
import torch

from sglang_bridge.ticket_tensor import (
    PickledTicket,
    plain_tensor,
    response_form,
    ticket_text,
)

ENVELOPE = bytes(range(256))[:233]


@pytest.fixture
def output(sglang: SimpleNamespace) -> Any:
    """Make the message that carries a step's tickets from SGLang's scheduler."""
    from sglang.srt.managers.io_struct import BatchTokenIDOutput

    def make(tickets: list[Any]) -> Any:
        empty = {
            field.name: None if isinstance(None, _plain(field.type)) else []
            for field in msgspec.structs.fields(BatchTokenIDOutput)
            if field.required
        }
        return BatchTokenIDOutput(**{**empty, "routed_experts": tickets})

    return make


def _plain(annotation: Any) -> tuple[type, ...]:
    """The types of a union, without their parameters."""
    parts = typing.get_args(annotation) if type(None) in typing.get_args(annotation) else ()
    return tuple(typing.get_origin(part) or part for part in parts)


def assert_plain(tensor: Any, envelope: bytes = ENVELOPE) -> None:
    assert type(tensor) is torch.Tensor
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (len(envelope),)
    assert tensor.numpy().tobytes() == envelope


def assert_text(text: Any, envelope: bytes = ENVELOPE) -> None:
    """What SGLang makes of the tensor, and gives its bytes as the tensor does."""
    assert isinstance(text, str)
    assert text == base64.b64encode(envelope).decode()
    assert text.numpy().tobytes() == envelope


def test_a_tensor_s_bytes_are_the_envelope() -> None:
    assert_plain(plain_tensor(ENVELOPE))


@pytest.mark.parametrize(("pickles", "form"), [(True, PickledTicket), (False, plain_tensor)])
def test_the_form_is_the_one_that_sglang_s_transport_carries(
    sglang: SimpleNamespace, pickles: bool, form: Any
) -> None:
    from sglang.srt.environ import envs

    with envs.SGLANG_USE_PICKLE_IPC.override(pickles):
        assert response_form() is form


def test_its_size_is_the_envelope_s() -> None:
    assert PickledTicket(ENVELOPE).nbytes == plain_tensor(ENVELOPE).nbytes == len(ENVELOPE)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_round_trip_gives_its_base64(protocol: int) -> None:
    assert_text(pickle.loads(pickle.dumps(PickledTicket(ENVELOPE), protocol)))


def test_what_comes_out_of_a_pickle_can_be_pickled_on() -> None:
    assert_text(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(PickledTicket(ENVELOPE))))))


@pytest.mark.parametrize("size", range(1, 8))
def test_its_base64_is_the_same_whatever_its_length(size: int) -> None:
    assert_text(ticket_text(ENVELOPE[:size]), ENVELOPE[:size])


def test_a_response_s_json_has_it_as_any_other_text() -> None:
    """SGLang writes its responses with orjson."""
    text = base64.b64encode(ENVELOPE).decode()
    written = orjson.dumps({"routed_experts": ticket_text(ENVELOPE)})
    assert orjson.loads(written) == {"routed_experts": text}


def test_a_pickle_is_hardly_larger_than_the_envelope() -> None:
    pickled = pickle.dumps(PickledTicket(ENVELOPE), pickle.HIGHEST_PROTOCOL)
    assert len(pickled) <= len(ENVELOPE) + 80


def test_a_pickled_step_s_output_is_hardly_larger_than_its_envelopes(output: Any) -> None:
    """As SGLang sends it by default (``SGLANG_USE_PICKLE_IPC``)."""
    envelopes = [bytes([number]) * 233 for number in range(160)]
    with_tickets = output([PickledTicket(envelope) for envelope in envelopes])
    message = pickle.dumps(with_tickets, pickle.HIGHEST_PROTOCOL)
    without = pickle.dumps(output([None] * 160), pickle.HIGHEST_PROTOCOL)
    assert len(message) - len(without) <= 160 * (233 + 16) + 100
    for text, envelope in zip(pickle.loads(message).routed_experts, envelopes, strict=True):
        assert_text(text, envelope)


def test_sglang_s_msgpack_carries_a_tensor(output: Any) -> None:
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    message = msgpack_encode(output([plain_tensor(ENVELOPE), None]))
    ours, nothing = msgpack_decode(message).routed_experts
    assert nothing is None
    assert_plain(ours)


def test_the_detokenizer_makes_base64_of_the_envelope_of_it(sglang: SimpleNamespace) -> None:
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager

    arrived = pickle.loads(pickle.dumps(PickledTicket(ENVELOPE)))
    encode: Any = DetokenizerManager._b64_encode_per_request
    text, nothing = encode([arrived, None])
    assert nothing is None
    assert base64.b64decode(text) == ENVELOPE
