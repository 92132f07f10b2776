"""A ticket on its way through SGLang, where a response's routes arrive as a tensor.

SGLang pickles its scheduler's output by default, and a tensor costs 40 us and more that way:
6 ms for 160 requests of one step, on the scheduler thread. What is pickled there is as small as
the envelope, costs under 1 us more than None, and arrives as a plain tensor. SGLang's msgpack
(``SGLANG_USE_PICKLE_IPC=0``) takes nothing but a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def plain_tensor(envelope: bytes) -> torch.Tensor:
    """``uint8 [bytes]`` that owns its storage: pickling a view would send the whole of it."""
    return torch.frombuffer(bytearray(envelope), dtype=torch.uint8)


class PickledTicket:
    """An envelope that pickles as ``plain_tensor(envelope)``, and is no tensor before that.

    A tensor would only be made to be taken apart again, in code that has not run for a while.
    """

    __slots__ = ("envelope",)

    def __init__(self, envelope: bytes) -> None:
        self.envelope = envelope

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_tensor, (self.envelope,)

    @property
    def nbytes(self) -> int:
        return len(self.envelope)


def response_form() -> Callable[[bytes], Any]:
    """What makes of an envelope the value of ``req.routed_experts``."""
    from sglang.srt.environ import envs

    return PickledTicket if envs.SGLANG_USE_PICKLE_IPC.get() else plain_tensor
