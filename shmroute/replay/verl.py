"""Routes of an SGLang engine with an arena, in verl.

verl's configuration::

    actor_rollout_ref.model.external_lib=shmroute.replay.verl
    actor_rollout_ref.rollout.skip_tokenizer_init=False

verl imports this module in every process that has a model's configuration. It has one effect,
in the rollout server: verl 0.9.1 decodes a response's routes with a function from a module that
SGLang no longer has, ``sglang.srt.layers.moe.routed_experts_capturer``. That name is filled
with ``from_meta_info``. Nothing that exists is replaced: where SGLang still has the module, or
verl is another one, the import fails and says so.

``TokenOutput.routed_experts`` then is an array that travels as its ticket from the rollout server
to the agent loop, where it is verl's ``int16 [tokens - 1, num_layers, top_k]``. From there on verl
sends rows, padded. With ``verl_engine`` and ``verl_agent_loop`` tickets travel on to the trainer's
GPU. See docs/trainers/verl.md.

When records are released: as soon as the agent loop has the rows; with ``verl_agent_loop``, see
there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ReplayError
from . import row_ranges
from .row_ranges import RowRange
from .travelling import TravellingRows

KNOWN_VERL = ("0.9.1",)
#: Key of a sample's tickets, a tuple of ``RowRange``, among verl's extra fields.
ROUTES = "shmroute"
MISSING = "sglang.srt.layers.moe.routed_experts_capturer"

# Set in an agent loop's process whose tickets shall travel on, see ``verl_agent_loop``.
_keeps_tickets = False


class CapturedRoutes:
    """The routes of one response, until verl says their shape.

    Parameters
    ----------
    ticket
        ``routed_experts`` of the response; None: it has none.
    """

    def __init__(self, ticket: Any) -> None:
        self._ticket = ticket

    def reshape(self, rows: int, num_layers: int, top_k: int) -> TravellingRows | None:
        """Rows ``[tokens - 1, num_layers, top_k]``; ``rows`` is -1: as many as there are.

        Raises
        ------
        ReplayError
            Another top-k, or rows that do not begin with the sequence: verl asks each turn for
            the whole of it, and keeps the last turn's in place of those before.
        InvalidTicket, RouteFailed
            See ``shmroute.errors``.
        """
        if self._ticket is None:
            return None
        turn, start = row_ranges.rows_of(self._ticket, top_k=top_k)
        if start:
            raise ReplayError(
                f"this response has routes from token {start} on, and verl takes each as those of "
                "the whole sequence: send the request without routed_experts_start_len"
            )
        return TravellingRows([turn], num_layers, top_k, load)


def from_meta_info(output: Mapping[str, Any]) -> CapturedRoutes:
    """What verl calls on SGLang's output to have its routes."""
    return CapturedRoutes(output["meta_info"].get("routed_experts"))


def load(ranges: Sequence[RowRange], num_layers: int, top_k: int) -> Any:
    """The rows in an agent loop's process, as verl's native path has them after its cast."""
    if _keeps_tickets:
        return TravellingRows(ranges, num_layers, top_k, load)
    rows = row_ranges.native(ranges, num_layers=num_layers, top_k=top_k, dtype=np.int16)
    row_ranges.release_all(ranges)  # nobody else was given this response
    return rows


def keep_tickets() -> None:
    """Let ``TravellingRows`` stay unread in this process."""
    global _keeps_tickets
    _keeps_tickets = True


def fill_missing_module() -> None:
    """Put ``from_meta_info`` where verl looks for SGLang's decoder.

    Raises
    ------
    ReplayError
        verl is none that is known, or SGLang has the module.
    """
    verl = importlib.metadata.version("verl")
    if verl not in KNOWN_VERL:
        raise ReplayError(
            f"shmroute.replay.verl knows how verl {', '.join(KNOWN_VERL)} decodes routes, not verl "
            f"{verl}: install verl=={KNOWN_VERL[-1]}"
        )
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        return  # a trainer's environment
    parts = MISSING.split(".")[1:]
    file = Path(found.submodule_search_locations[0], *parts).with_suffix(".py")
    if file.exists():
        raise ReplayError(
            f"{file} exists, which verl would decode tickets with as if they were rows: install a "
            "SGLang from 0.5.13 on"
        )
    module = types.ModuleType(MISSING, "Filled in by shmroute.replay.verl.")
    module.extract_routed_experts_from_meta_info = from_meta_info  # type: ignore[attr-defined]
    sys.modules[MISSING] = module


fill_missing_module()
