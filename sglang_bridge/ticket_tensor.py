"""A ticket on its way through SGLang, which takes nothing but a tensor there.

SGLang pickles its scheduler's output by default, and a tensor costs 40 us and more that way:
6 ms for 160 requests of one step, on the scheduler thread. This one pickles as its bytes (under
1 us more than None) and arrives as a plain tensor. Through msgpack it goes as any tensor.
"""

from __future__ import annotations

from typing import Any

import torch


def plain_tensor(envelope: bytes) -> torch.Tensor:
    """``uint8 [bytes]`` that owns its storage: pickling a view would send the whole of it."""
    return torch.frombuffer(bytearray(envelope), dtype=torch.uint8)


class TicketTensor(torch.Tensor):
    """``uint8 [bytes]``: an envelope; pickles as ``plain_tensor(envelope)``."""

    envelope: bytes
    # Operations on it give plain tensors, and cost what they cost there.
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return plain_tensor, (self.envelope,)


def ticket_tensor(envelope: bytes) -> TicketTensor:
    """The tensor for ``req.routed_experts``."""
    tensor: TicketTensor = plain_tensor(envelope).as_subclass(TicketTensor)
    tensor.envelope = envelope
    return tensor
