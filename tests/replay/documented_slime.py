"""slime's interface as it is documented, for tests: slime is not on the package index.

Not slime: it says what slime does with routes, in as few lines as that takes, by the same tensor
operations. A sample joins turns and checks their size; a trainer rank pads each sequence's last
row, cuts zigzag chunks, pads the batch and takes its sequence-parallel part, pads being
``arange % num_experts``; a router records its layer, or an object that makes it when asked.
"""

from __future__ import annotations

import base64
import dataclasses
from argparse import Namespace
from typing import Any, ClassVar

import torch


def decoded(value: Any) -> torch.Tensor:
    """``meta_info["routed_experts"]``: text of int32, or a tensor."""
    if isinstance(value, str):
        return torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.int32)
    flat: torch.Tensor = value.detach().to(device="cpu", dtype=torch.int32).reshape(-1)
    return flat


@dataclasses.dataclass
class Sample:
    tokens: list[int]
    response_length: int = 0
    rollout_routed_experts: Any = None

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: list[int],
        log_probs: list[float] | None = None,
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        text: str | None = None,
    ) -> None:
        self.tokens = self.tokens + tokens
        self.response_length += len(tokens)
        if not meta_info or meta_info.get("routed_experts") is None:
            return
        start = int(meta_info.get("routed_experts_start_len", 0) or 0)
        row = (args.num_layers, args.moe_router_topk)
        routed = decoded(meta_info["routed_experts"])
        rows = len(self.tokens) - 1 - start
        if routed.numel() != rows * row[0] * row[1]:
            raise ValueError(f"{routed.numel()} ids for {rows} rows")
        routed = routed.reshape(rows, *row)
        if start:
            routed = torch.cat([self.rollout_routed_experts[:start], routed], dim=0)
        self.rollout_routed_experts = routed


class RoutingReplay:
    """One router's replay. It has a place for each of the two ways in which it is read."""

    replays: ClassVar[list[RoutingReplay]] = []
    lazy_resources: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        RoutingReplay.replays.append(self)
        self.clear()

    def clear(self) -> None:
        self.recorded: list[Any] = []
        self.read = {"forward": 0, "backward": 0}

    def record(self, top_indices: Any) -> None:
        if not hasattr(top_indices, "materialize_for_routing_replay"):
            top_indices = top_indices.clone()
        self.recorded.append(top_indices)

    def pop_forward(self) -> torch.Tensor:
        return self._next("forward")

    def pop_backward(self) -> torch.Tensor:
        return self._next("backward")

    def _next(self, stage: str) -> torch.Tensor:
        """The next micro-batch's rows."""
        found = self.recorded[self.read[stage]]
        self.read[stage] += 1
        if hasattr(found, "materialize_for_routing_replay"):
            found = found.materialize_for_routing_replay(stage)
        rows: torch.Tensor = found
        return rows

    @staticmethod
    def register_lazy_resource(resource: Any) -> None:
        RoutingReplay.lazy_resources.append(resource)

    @staticmethod
    def begin_lazy_pass(release_stage: str) -> None:
        """Before log-probabilities are computed ("forward") and before training ("backward")."""
        for resource in RoutingReplay.lazy_resources:
            resource.begin_pass(release_stage)

    @staticmethod
    def clear_all_forward() -> None:
        """Log-probabilities are computed: the training step's forward reads from the first on."""
        for replay in RoutingReplay.replays:
            replay.read["forward"] = 0

    @staticmethod
    def assert_all_consumed() -> None:
        for replay in RoutingReplay.replays:
            if set(replay.read.values()) != {len(replay.recorded)}:
                raise RuntimeError(f"{len(replay.recorded)} recorded, read: {replay.read}")

    @staticmethod
    def clear_all() -> None:
        for replay in RoutingReplay.replays:
            replay.clear()
        for resource in RoutingReplay.lazy_resources:
            resource.close()
        RoutingReplay.lazy_resources = []


def sent_to_trainer(rows: Any) -> torch.Tensor:
    """What the rollout puts into Ray."""
    return torch.as_tensor(rows).detach().cpu().contiguous()


def padded(rows: torch.Tensor, pad: int, num_experts: int) -> torch.Tensor:
    if not pad:
        return rows
    _, layers, top_k = rows.shape
    ids = torch.arange(pad * layers * top_k, device=rows.device, dtype=rows.dtype) % num_experts
    return torch.cat([rows, ids.reshape(pad, layers, top_k)], dim=0)


def of_rank(sequences: list[torch.Tensor], rank: Namespace, num_experts: int) -> torch.Tensor:
    """The rows of a rank's tokens."""
    rows = [padded(each, 1, num_experts) for each in sequences]
    if rank.allgather:
        whole = torch.cat(rows, dim=0)
        multiple = rank.cp_size * rank.multiple
        local = padded(whole, -whole.size(0) % multiple, num_experts).chunk(rank.cp_size, dim=0)[
            rank.cp_rank
        ]
    else:
        local = torch.cat([zigzag(each, rank, num_experts) for each in rows], dim=0)
        local = padded(local, -local.size(0) % rank.multiple, num_experts)
    part = local.size(0) // rank.sp_size
    return local[part * rank.sp_rank : part * (rank.sp_rank + 1)]


def zigzag(rows: torch.Tensor, rank: Namespace, num_experts: int) -> torch.Tensor:
    if rank.cp_size == 1:
        return rows
    chunks = 2 * rank.cp_size
    rows = padded(rows, -len(rows) % chunks, num_experts)
    chunk = len(rows) // chunks
    front, back = chunk * rank.cp_rank, chunk * (chunks - 1 - rank.cp_rank)
    return torch.cat([rows[front : front + chunk], rows[back : back + chunk]])
