"""The capturer that SGLang's models write into, with the route table behind it.

It keeps SGLang's capture buffer (each layer writes ``[tokens, layer, top_k]`` into it, from
within CUDA graphs where there are any) and replaces what comes after: instead of a copy to
a host cache at each step, one scatter into the route table.

Every rank has one, since models branch on whether a capturer exists and some capture with
collectives. Only the owner (pipeline, attention-TP and attention-CP rank 0) has a table
and an arena.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel, get_schedule, get_serving
from sglang.srt.state_capturer.base import BaseDeviceCache
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

from shmroute import Arena
from shmroute.counters import SHADOW, Counters

from .epochs import WeightEpochs
from .errors import StartRefused
from .layers import route_layout
from .publisher import Publisher
from .settings import Settings
from .shadow import Shadow
from .table import RouteTable
from .tags import FOREIGN_TOKEN, POSITION_MAX

logger = logging.getLogger("shmroute")


class ArenaCapturer(RoutedExpertsCapturer):
    """SGLang's capturer without (or, in shadow mode, beside) its host cache.

    Attributes
    ----------
    publisher, epochs
        The owner's; None on other ranks.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        model: torch.nn.Module,
        model_config: Any,
        num_tokens: int,
        max_running_requests: int,
        device: str,
    ) -> None:
        fused = model.shared_experts_config.num_fused_shared_experts
        text = model_config.hf_text_config
        self.publisher: Publisher | None = None
        self.epochs = WeightEpochs(get_serving().weight_version)
        self.shadow = settings.shadow
        if settings.shadow:
            super().__init__(model_config, num_tokens, max_running_requests, fused, device)
        else:
            self.num_fused_shared_experts = fused
            self.topk_size, self.num_layers = text.num_experts_per_tok, text.num_hidden_layers
            self.host_cache: Any = None
        self.device_cache = BaseDeviceCache(
            largest_forward(max_running_requests, int(model_config.context_len)),
            self.num_layers,
            self.topk_size + fused,
            device,
            name="routed_experts",
        )
        self.device_cache.buffer.fill_(-1)
        self._entry: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._num_tokens = num_tokens
        if _is_owner():
            self._own(settings, model, model_config, device)

    def _own(
        self, settings: Settings, model: torch.nn.Module, model_config: Any, device: str
    ) -> None:
        routes = route_layout(
            model,
            model_name=str(model_config.model_path),
            config=model_config.hf_text_config,
            device=device,
        )
        if settings.table == "gpu":
            raise StartRefused("--shmroute-table gpu: this engine runs on a CPU; leave it at auto")
        if model_config.context_len > POSITION_MAX:
            raise StartRefused(
                f"a context of {model_config.context_len} tokens: tags tell {POSITION_MAX} apart"
            )
        arena = Arena.create(
            settings.arena,
            routes,
            capacity=settings.capacity,
            slots=settings.slots,
            retention=settings.retention,
            keep_versions=settings.keep_versions,
            checksum=settings.checksum,
            maintained=True,
        )
        counters = Counters(arena.memory.counters, SHADOW)
        vocabulary = min(int(model_config.vocab_size), FOREIGN_TOKEN)
        publisher = Publisher(
            arena,
            self.epochs,
            vocabulary=vocabulary,
            inline_when_full=settings.on_full == "inline",
            shadow=Shadow(routes, counters) if settings.shadow else None,
        )
        self.table = RouteTable(
            routes, self._num_tokens, device, vocabulary=vocabulary, fence=publisher.fence
        )
        publisher.counters.set("table_bytes", self.table.nbytes)
        publisher.start(self.table)
        self.publisher = publisher
        logger.warning(
            "shmroute: arena %s (%s): %.2f GiB, %d slots; route table of %d KV tokens on %s: "
            "%.1f MiB; %d MoE layers, top-%d of %d experts, %s%s",
            settings.arena,
            arena.segment.data,
            settings.capacity / 2**30,
            settings.slots,
            self._num_tokens,
            device,
            self.table.nbytes / 2**20,
            *routes.row_shape,
            routes.num_experts,
            routes.dtype.name,
            "; shadow mode" if settings.shadow else "",
        )

    # -- at each forward ---------------------------------------------------------------------

    def on_forward_begin(self, forward_batch: Any) -> None:
        """Keep what the forward is about: token ids, positions, KV locations, unpadded.

        Before the model runs, because multimodal code clamps ids in place, and data
        parallelism pads them and does not take it back.
        """
        self._entry = None
        if self.publisher is None:
            return
        locations = forward_batch.out_cache_loc_virtual
        if locations is None:
            locations = forward_batch.out_cache_loc
        tokens = forward_batch.input_ids
        if forward_batch.contains_mm_inputs():
            tokens = tokens.clone()
        self._entry = tokens, forward_batch.positions, locations

    def on_forward_end(
        self,
        forward_batch: Any,
        can_run_graph: bool,
        cuda_graph_batch: int | None,
        no_copy_to_cpu: bool = False,
    ) -> Any:
        """Scatter the captured routes into the table; in shadow mode, SGLang's way as well."""
        native = None
        if self.shadow:
            native = super().on_forward_end(
                forward_batch, can_run_graph, cuda_graph_batch, no_copy_to_cpu
            )
        if self.publisher is not None:
            captured = self._get_local_slice(forward_batch, can_run_graph, cuda_graph_batch)
            self._scatter(self.publisher, captured)
        return native

    def _scatter(self, publisher: Publisher, captured: torch.Tensor) -> None:
        entry, self._entry = self._entry, None
        try:
            publisher.flush()  # what an interrupted step left pending
            if entry is None or entry[0] is None:
                raise RuntimeError("a forward ended whose beginning was not seen")
            tokens, positions, locations = entry
            count = len(tokens)
            if len(captured) < count:
                # Locations without new rows would keep a former occupant's, tags and all.
                raise RuntimeError(f"{len(captured)} rows were captured for {count} tokens")
            self.table.scatter(
                captured[:count],
                locations[:count],
                tokens[:count],
                positions[:count],
                self.epochs.mark_used(),
            )
        except Exception:
            # The KV of this forward was written, its routes were not: every tag is in doubt.
            logger.exception("shmroute: routes of a forward were lost; their rows will be missing")
            publisher.counters.add("hook_errors")
            self.table.forget()
        finally:
            captured.fill_(-1)  # a layer that does not capture next time must not show these

    def weights_change(self, label: str | None) -> None:
        """Weights begin to change; rows from now on belong to another epoch."""
        self.epochs.begin_update(label)
        if self.publisher is not None:
            self.publisher.arena.writer.weight_epoch = self.epochs.current

    def destroy(self) -> None:
        """The scheduler ends in good order: end the arena's writing, too."""
        if self.host_cache is not None:
            super().destroy()
        if self.publisher is not None:
            self.publisher.stop()


def largest_forward(max_running_requests: int, context_length: int) -> int:
    """Rows that the capture buffer needs: the largest prefill, with decodes mixed in.

    SGLang's own bound forgets mixed decodes, and ``chunked_prefill_size = -1`` (then only
    ``max_prefill_tokens`` and the context bound a prefill).
    """
    schedule, ranks = get_schedule(), get_parallel().num_dp_ranks
    chunk = schedule.chunked_prefill_size
    if chunk is None or chunk <= 0:
        chunk = max(schedule.max_prefill_tokens, context_length)
    return int((chunk + max_running_requests) * ranks)


def _is_owner() -> bool:
    parallel = get_parallel()
    return parallel.pp_rank == 0 and parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0
