"""A ticket on its way through SGLang, where a response's routes arrive as a tensor.

SGLang pickles its scheduler's output by default, and a tensor costs 40 us and more that way:
6 ms for 160 requests of one step, on the scheduler thread. What is pickled there is as small as
the envelope and costs under 1 us more than None. Where it arrives SGLang makes base64 of a tensor
before it passes on what the step has for all other requests, so no tensor arrives, but what comes
to the same there:

    detokenizer         asks what it gets for ``numpy().tobytes()``: bytes that answer
    tokenizer manager   (``skip_tokenizer_init``) encodes a tensor and passes all else on: the text

SGLang's msgpack (``SGLANG_USE_PICKLE_IPC=0``) takes nothing but a tensor.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from typing import Any

import torch


def plain_tensor(envelope: bytes) -> torch.Tensor:
    """``uint8 [bytes]`` that owns its storage: pickling a view would send the whole of it."""
    return torch.frombuffer(bytearray(envelope), dtype=torch.uint8)


class ArrivedEnvelope(bytes):
    """An envelope that answers as its tensor would: for the detokenizer, which encodes it."""

    __slots__ = ()

    def numpy(self) -> ArrivedEnvelope:
        return self

    def tobytes(self) -> bytes:
        return bytes(self)


def arrived_text(envelope: bytes) -> str:
    """The base64 that SGLang would make of the tensor; users get it, so it is a plain ``str``."""
    return str(binascii.b2a_base64(envelope, newline=False), "ascii")


class PickledTicket:
    """An envelope that pickles as an `ArrivedEnvelope`, and is no more than that before.

    A tensor would only be made to be taken apart again, in code that has not run for a while.
    """

    __slots__ = ("envelope",)
    arrives: Callable[[bytes], Any] = ArrivedEnvelope

    def __init__(self, envelope: bytes) -> None:
        self.envelope = envelope

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).arrives, (self.envelope,)

    @property
    def nbytes(self) -> int:
        return len(self.envelope)


class PickledText(PickledTicket):
    """An envelope that pickles as its base64."""

    __slots__ = ()
    arrives = staticmethod(arrived_text)


def response_form(*, detokenizer: bool) -> Callable[[bytes], Any]:
    """What makes of an envelope the value of ``req.routed_experts``.

    ``detokenizer``: responses pass SGLang's, which they do without ``skip_tokenizer_init``.
    """
    from sglang.srt.environ import envs

    if not envs.SGLANG_USE_PICKLE_IPC.get():
        return plain_tensor
    return PickledTicket if detokenizer else PickledText
