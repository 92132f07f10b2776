"""A ticket on its way through SGLang, where a response's routes arrive as a tensor.

SGLang pickles its scheduler's output by default, and a tensor costs 40 us and more that way:
6 ms for 160 requests of one step, on the scheduler thread. What is pickled there is as small as
the envelope and costs under 1 us more than None. Where it arrives SGLang makes base64 of a tensor,
before it passes on what else the step has for all other requests; so it arrives as that text.
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


class TicketText(str):
    """The base64 that SGLang would make of ``plain_tensor(envelope)``, without the tensor.

    Its tokenizer manager encodes what is a tensor and passes on what is text. Its detokenizer
    asks whatever it gets for ``numpy().tobytes()``.
    """

    __slots__ = ()

    def numpy(self) -> TicketText:
        return self

    def tobytes(self) -> bytes:
        return binascii.a2b_base64(self)


def ticket_text(envelope: bytes) -> TicketText:
    return TicketText(binascii.b2a_base64(envelope, newline=False), "ascii")


class PickledTicket:
    """An envelope that pickles as ``ticket_text(envelope)``, and is no more than that before.

    A tensor would only be made to be taken apart again, in code that has not run for a while.
    """

    __slots__ = ("envelope",)

    def __init__(self, envelope: bytes) -> None:
        self.envelope = envelope

    def __reduce__(self) -> tuple[Any, ...]:
        return ticket_text, (self.envelope,)

    @property
    def nbytes(self) -> int:
        return len(self.envelope)


def response_form() -> Callable[[bytes], Any]:
    """What makes of an envelope the value of ``req.routed_experts``."""
    from sglang.srt.environ import envs

    return PickledTicket if envs.SGLANG_USE_PICKLE_IPC.get() else plain_tensor
