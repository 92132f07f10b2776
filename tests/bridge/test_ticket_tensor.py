"""A ticket crosses SGLang's processes as what they take: a tensor, or what answers like one."""

from __future__ import annotations

import base64
import pickle
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from sglang_bridge.ticket_tensor import (
    ArrivedEnvelope,
    PickledText,
    PickledTicket,
    arrived_text,
    plain_tensor,
    response_form,
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


def assert_answers_as_a_tensor(arrived: Any, envelope: bytes = ENVELOPE) -> None:
    assert type(arrived) is ArrivedEnvelope
    assert arrived.numpy().tobytes() == envelope


def assert_text(text: Any, envelope: bytes = ENVELOPE) -> None:
    """What SGLang makes of the tensor, of no type of ours: users get it and pickle it on."""
    assert type(text) is str
    assert text == base64.b64encode(envelope).decode()


def test_a_tensor_s_bytes_are_the_envelope() -> None:
    assert_plain(plain_tensor(ENVELOPE))


@pytest.mark.parametrize(
    ("pickles", "detokenizer", "form"),
    [
        (True, True, PickledTicket),
        (True, False, PickledText),
        (False, True, plain_tensor),
        (False, False, plain_tensor),
    ],
)
def test_the_form_is_the_one_that_sglang_s_transport_carries(
    sglang: SimpleNamespace, pickles: bool, detokenizer: bool, form: Any
) -> None:
    from sglang.srt.environ import envs

    with envs.SGLANG_USE_PICKLE_IPC.override(pickles):
        assert response_form(detokenizer=detokenizer) is form


def test_its_size_is_the_envelope_s() -> None:
    assert PickledTicket(ENVELOPE).nbytes == plain_tensor(ENVELOPE).nbytes == len(ENVELOPE)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize(
    ("form", "check"),
    [(PickledTicket, assert_answers_as_a_tensor), (PickledText, assert_text)],
)
def test_a_pickle_round_trip_gives_what_its_receiver_takes(
    form: Any, check: Callable[[Any], None], protocol: int
) -> None:
    arrived = pickle.loads(pickle.dumps(form(ENVELOPE), protocol))
    check(arrived)
    check(pickle.loads(pickle.dumps(arrived, protocol)))  # passed on by a router


@pytest.mark.parametrize("size", range(1, 8))
def test_its_base64_is_the_same_whatever_its_length(size: int) -> None:
    assert_text(arrived_text(ENVELOPE[:size]), ENVELOPE[:size])


def test_a_pickle_is_hardly_larger_than_the_envelope() -> None:
    pickled = pickle.dumps(PickledTicket(ENVELOPE), pickle.HIGHEST_PROTOCOL)
    assert len(pickled) <= len(ENVELOPE) + 80


@pytest.mark.parametrize(
    ("form", "check"),
    [(PickledTicket, assert_answers_as_a_tensor), (PickledText, assert_text)],
)
def test_a_pickled_step_s_output_is_hardly_larger_than_its_envelopes(
    output: Any, form: Any, check: Callable[..., None]
) -> None:
    """As SGLang sends it by default (``SGLANG_USE_PICKLE_IPC``)."""
    envelopes = [bytes([number]) * 233 for number in range(160)]
    with_tickets = output([form(envelope) for envelope in envelopes])
    message = pickle.dumps(with_tickets, pickle.HIGHEST_PROTOCOL)
    without = pickle.dumps(output([None] * 160), pickle.HIGHEST_PROTOCOL)
    assert len(message) - len(without) <= 160 * (233 + 16) + 100
    for arrived, envelope in zip(pickle.loads(message).routed_experts, envelopes, strict=True):
        check(arrived, envelope)


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
