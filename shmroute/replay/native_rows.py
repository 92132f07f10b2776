"""Tells SGLang's native routes from a rid: both are text where a ticket is expected.

A short answer's routes look like a rid by their length. They are told by what is in them: base64
of whole rows of int32, all of which are expert numbers. In a rid's bytes each third and fourth
would have to be zero.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np

_EXPERTS_MAX = 1 << 16


def looks_native(text: str, *, top_k: int) -> bool:
    """Whether a response's text is rows ``int32 [rows, layers, top_k]`` in base64."""
    try:
        rows = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # the latter: characters beyond ASCII
        return False
    if not rows or len(rows) % (4 * top_k):
        return False
    ids = np.frombuffer(rows, dtype="<i4")
    return bool(ids.min() >= 0 and ids.max() < _EXPERTS_MAX)
