"""The capturer that SGLang's models write into, with the route table behind it.

It keeps SGLang's capture buffer (each layer writes ``[tokens, layer, top_k]`` into it) and replaces
what comes after: instead of a copy to a host cache at each step, one scatter into the route table.
On a GPU most forwards go without that buffer: a decode graph stores its routes in the table itself
(``decode_graphs``), and outside of graphs the routers' own tensors are read (``eager_forwards``).

Every rank has one, since models branch on whether a capturer exists. Only the owner (pipeline,
attention-TP and attention-CP rank 0) has a table and an arena; the others capture nothing. That
is right because the backends whose capture is a collective, all-to-all ones, are refused.

With DP attention that is one owner a DP rank, and MoE layers run on the tokens of all ranks, so
that each rank captures everybody's routes, rank after rank::

    eager          | rank 0's tokens | rank 1's | ...   padded to their own lengths (SUM_LEN) or
                                                        to the longest of them (MAX_LEN)
    decode graph   | rank 0's | rank 1's | ...          all padded to the batch of the graph

A rank takes its own rows, which SGLang finds right in these two cases (``_get_local_slice``), and
puts -1 into all of them. With a prefill graph SGLang takes the decode graph's batch for the
length of a rank's part, so those are refused with DP attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.runtime_context import get_parallel, get_schedule, get_server_args, get_serving
from sglang.srt.state_capturer.base import BaseDeviceCache
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

from shmroute import Arena

from .epochs import WeightEpochs
from .errors import StartRefused
from .finished import Gatherer
from .gather_host import HostGatherer
from .layer_views import LayerViews
from .layers import route_layout
from .publisher import Publisher
from .settings import Settings
from .table import RouteTable, place_table
from .tags import FOREIGN_TOKEN, POSITION_MAX
from .ticket_tensor import response_form
from .versions import (
    data_parallel_ranks,
    decode_graph_capture_reader,
    decode_graphs_store_routes,
    fused_shared_experts,
    kv_locations_reader,
    resolved_arguments,
    routes_stay,
)

if TYPE_CHECKING:
    from .decode_graphs import DecodeGraphs
    from .eager_forwards import EagerForwards

logger = logging.getLogger("shmroute")

_kv_locations = kv_locations_reader()


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
        fused = fused_shared_experts(model)
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
        self._buffer = self.device_cache.buffer.fill_(-1)
        self._shares_buffer = is_dp_attention_enabled()
        # Where ranks share the buffer, SGLang alone tells whose rows are whose, in its own.
        self._copies = _is_owner() and not (self.shadow and self._shares_buffer)
        if self.shadow and self._copies:
            # SGLang's way gets its own copies, into a buffer that it alone has: with ours in it
            # it would be compared with itself.
            self._buffer = torch.full_like(self._buffer, -1)
        # One view for all forwards: their rows are the first ones, unless ranks share the buffer.
        self._every_row = self._buffer[:, :, : self.topk_size]
        self._layers = LayerViews(self._every_row)
        self._decode_graphs: DecodeGraphs | None = None
        self._eager: EagerForwards | None = None
        self._multimodal = bool(model_config.is_multimodal)
        self._entry: _Entry | None = None
        self._dirty = True  # warm-ups most likely go through the capture buffer
        self._num_tokens = num_tokens
        if _is_owner():
            self._own(settings, model, model_config, device)

    def _own(
        self, settings: Settings, model: torch.nn.Module, model_config: Any, device: str
    ) -> None:
        arguments = resolved_arguments(get_server_args())
        routes = route_layout(
            model,
            model_name=str(model_config.model_path),
            config=model_config.hf_text_config,
            device=device,
        )
        if model_config.context_len > POSITION_MAX:
            raise StartRefused(
                f"a context of {model_config.context_len} tokens: tags tell {POSITION_MAX} apart"
            )
        vocabulary = min(int(model_config.vocab_size), FOREIGN_TOKEN)
        self.table = place_table(settings.table, routes, self._num_tokens, device, vocabulary)
        arena = Arena.create(
            settings.arena,
            routes,
            capacity=settings.capacity,
            slots=settings.slots,
            retention=settings.retention,
            keep_versions=settings.keep_versions,
            checksum=settings.checksum,
            maintained=True,
            in_background=True,
        )
        publisher = Publisher(
            arena,
            self.epochs,
            make_gatherer(self.table, arena),
            vocabulary=vocabulary,
            inline_when_full=settings.on_full == "inline",
            shadow=settings.shadow,
            respond=response_form(detokenizer=not arguments.skip_tokenizer_init),
        )
        publisher.counters.set("table_bytes", self.table.nbytes)
        publisher.counters.set("table_device_bytes", self.table.device_bytes)
        publisher.start()
        if self.table.device.type == "cuda" and not self._shares_buffer:
            self._read_routers(arguments)
        self.table.compile(self._every_row[:1])
        self.publisher = publisher
        logger.warning(
            "shmroute: arena %s (%s): %.2f GiB, %d slots; route table of %d KV tokens: "
            "%.1f MiB, of these %.1f MiB on %s; %d MoE layers, top-%d of %d experts, %s%s",
            settings.arena,
            arena.segment.data,
            settings.capacity / 2**30,
            settings.slots,
            self._num_tokens,
            self.table.nbytes / 2**20,
            self.table.device_bytes / 2**20,
            device,
            *routes.row_shape,
            routes.num_experts,
            routes.dtype.name,
            "; shadow mode" if settings.shadow else "",
        )

    def _read_routers(self, arguments: Any) -> None:
        """Have routes read off the routers' own tensors, where they stay."""
        # These need Triton, which not every CPU build has.
        from .decode_graphs import DecodeGraphs
        from .eager_forwards import EagerForwards

        if decode_graphs_store_routes(arguments):
            capturing = decode_graph_capture_reader()
            self._decode_graphs = DecodeGraphs(self.table, self._buffer, capturing)
        if routes_stay(arguments):
            self._eager = EagerForwards(self.table, self._buffer.shape[2], self._layers)
            self._eager.compile()

    def look_at(self, runner: Any) -> None:
        """See the model runner that made this capturer, before it captures any graph."""
        if self.publisher is not None:
            self.publisher.gatherer.look_at(runner.req_to_token_pool.req_to_token)
        if self._decode_graphs is not None:
            runner.capture_tail_hooks.append(self._decode_graphs.end_capture)

    # -- at each forward ---------------------------------------------------------------------

    def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
        """Keep a layer's routes, if anybody will read them.

        Of a forward that the buffer cannot hold, none: SGLang's own write would raise inside the
        model and end the engine. Its rows stay -1.
        """
        unread = self.publisher is None and not self.shadow
        if unread or topk_indices.shape[0] > self.device_cache.buffer.shape[0]:
            return
        if self.shadow:
            super().capture(layer_id, topk_indices)
        if self._copies and not self._keep(layer_id, topk_indices):
            self._layers.copy(layer_id, topk_indices)

    def _keep(self, layer_id: int, ids: torch.Tensor) -> bool:
        """Whether a layer's routes need no copy, since they will be read where they are."""
        if torch.compiler.is_compiling():
            return False  # what is traced runs without this code
        eager, graphs = self._eager, self._decode_graphs
        # Outside a forward graphs warm up or are captured.
        if eager is not None and self._entry is not None and eager.keep(layer_id, ids):
            return True
        return graphs is not None and graphs.keep(layer_id, ids)

    def on_forward_begin(self, forward_batch: Any) -> None:
        """Keep what the forward is about: token ids, positions, KV locations, unpadded.

        Before the model runs, because multimodal code clamps ids in place, and data
        parallelism pads them and does not take it back.
        """
        if self._entry is not None:  # a forward whose end was not seen
            self._entry, self._dirty = None, True
        publisher = self.publisher
        if publisher is None:
            return
        graphs = self._decode_graphs
        # A prefill graph is told of with an earlier decode graph's batch.
        decodes = graphs is not None and forward_batch.forward_mode.is_decode()
        try:
            publisher.flush()  # what an interrupted step left pending
        finally:
            # Whatever else goes wrong: a decode graph stores its routes by itself.
            number = publisher.gatherer.forward_begins(decodes)
        if graphs is not None and graphs.before_forward(self.epochs.current):
            self._dirty = True
        if self._dirty or self._layers.written:
            # A layer that does not capture must not show what others have left.
            self._clear_behind(0, everything=self._dirty)
            self._dirty = False
        tokens = forward_batch.input_ids
        # The second question looks at every request of the batch.
        if self._multimodal and forward_batch.contains_mm_inputs():
            tokens = tokens.clone()
        locations = _kv_locations(forward_batch)
        if self._eager is not None:
            self._eager.begin()
        self._entry = _Entry(number, tokens, forward_batch.positions, locations, decodes)

    def on_forward_end(
        self,
        forward_batch: Any,
        can_run_graph: bool,
        cuda_graph_batch: int | None,
        no_copy_to_cpu: bool = False,
    ) -> Any:
        """Scatter the captured routes into the table; in shadow mode, SGLang's way as well.

        What is returned rides with the batch's result through SGLang's overlap.
        """
        if self.publisher is None and not self.shadow:
            return None
        if self._shares_buffer:
            captured = self._get_local_slice(forward_batch, can_run_graph, cuda_graph_batch)
        else:
            captured = self._every_row
        native = None
        # SGLang's way would raise for a forward that the buffer could not hold.
        if self.shadow and len(captured) >= len(forward_batch.out_cache_loc):
            native = super().on_forward_end(
                forward_batch, can_run_graph, cuda_graph_batch, no_copy_to_cpu
            )
            if native is not None:
                # Copied to the host after this: by then the buffer holds -1, or the next forward's.
                native.map_device_tensors(torch.clone)
        if self.publisher is None:
            return native
        entry, self._entry = self._entry, None
        graphs = self._decode_graphs
        if (
            graphs is not None
            and can_run_graph
            and entry is not None
            and entry.decodes
            and graphs.has_stored(cuda_graph_batch)
        ):
            self.epochs.mark_used()
        else:
            self._scatter(self.publisher, captured, entry)
            if not self._shares_buffer:
                # How many rows a graph has is not told.
                tokens = 0 if entry is None else len(entry.tokens)
                self._clear_behind(tokens, everything=can_run_graph)
        if self._shares_buffer:
            # What other ranks' tokens left here would show where, next time, ours are in a layer
            # that does not capture.
            rows = rows_of_all_ranks(forward_batch, can_run_graph, cuda_graph_batch)
            self.device_cache.buffer[:rows].fill_(-1)
            self._layers.written = 0
        return ForwardMark(self.publisher, entry, native)

    def _scatter(self, publisher: Publisher, captured: torch.Tensor, entry: _Entry | None) -> None:
        try:
            if entry is None:
                raise RuntimeError("a forward ended whose beginning was not seen")
            count = len(entry.tokens)
            if len(captured) < count:
                raise RuntimeError(
                    f"a forward of {count} tokens, and the capture buffer holds {len(captured)}"
                )
            lengths = len(entry.locations), len(entry.positions)
            if min(lengths) < count:
                # Locations without new rows would keep a former occupant's, tags and all.
                raise RuntimeError(f"{lengths} locations and positions for {count} tokens")
            inputs = entry.locations, entry.tokens, entry.positions
            epoch = self.epochs.mark_used()
            if self._eager is None or not self._eager.store(*inputs, epoch):
                self.table.scatter(captured, *inputs, epoch)
        except Exception:
            # The KV of this forward was written, its routes were not: every tag is in doubt.
            logger.exception("shmroute: routes of a forward were lost; their rows will be missing")
            publisher.counters.add("hook_errors")
            self._forget(captured)

    def _clear_behind(self, tokens: int, *, everything: bool) -> None:
        """Put -1 behind a forward's own rows, where the scatter did not, or padding's routes would
        show there, next time, in a layer that does not capture.

        ``everything``: not only where layers have copied their routes.
        """
        written = len(self._every_row) if everything else self._layers.written
        if written > tokens:
            self._every_row[tokens:written].fill_(-1)
        self._layers.written = 0

    def _forget(self, captured: torch.Tensor) -> None:
        try:
            self.table.forget()
            captured.fill_(-1)
        except Exception:
            # A device that does not even do this ends the engine by itself.
            logger.exception("shmroute: the route table could not be declared invalid")

    def weights_change(self, label: str | None) -> None:
        """Weights begin to change; rows from now on belong to another epoch."""
        self.epochs.begin_update(label)
        if self.publisher is not None:
            self.publisher.arena.writer.weight_epoch = self.epochs.current

    def give_back_memory(self) -> None:
        """The engine gives its KV cache's memory to a colocated trainer, and the table's."""
        if self.publisher is not None:
            self.publisher.gatherer.give_back()

    def take_memory_again(self) -> None:
        """The KV cache is there again, empty."""
        if self.publisher is not None:
            self.publisher.gatherer.take_again()

    def destroy(self) -> None:
        """The scheduler ends in good order: end the arena's writing, too."""
        if self.host_cache is not None:
            super().destroy()
        if self.publisher is not None:
            self.publisher.stop()


class _Entry(NamedTuple):
    """What a forward is about, read before the model ran; the tensors are unpadded.

    ``decodes``: it may run in a decode graph that stores its routes.
    """

    number: int
    tokens: torch.Tensor
    positions: torch.Tensor
    locations: torch.Tensor
    decodes: bool


class ForwardMark:
    """Travels with a forward's result, by the duck type of SGLang's ``TopkCaptureOutput``.

    So the gatherer learns which forward's result is processed, and the native path, in shadow
    mode, still gets its own.
    """

    def __init__(self, publisher: Publisher, entry: _Entry | None, native: Any) -> None:
        self._publisher, self._entry, self._native = publisher, entry, native

    def map_device_tensors(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._native is not None:
            self._native.map_device_tensors(copy)

    def finalize(self) -> None:
        """The scheduler thread has waited for the forward's end and processes its result."""
        self._publisher.flush()  # what an interrupted step left pending
        gatherer = self._publisher.gatherer
        gatherer.result_processed(None if self._entry is None else self._entry.number)
        if self._native is not None:
            self._native.finalize()


def make_gatherer(table: RouteTable, arena: Arena) -> Gatherer:
    """The gatherer for the table's device."""
    if table.device.type == "cpu":
        return HostGatherer(table)
    from .gather_device import DeviceGatherer  # needs Triton, which not every CPU build has

    return DeviceGatherer(table, arena, arena.writer.counters)


def largest_forward(max_running_requests: int, context_length: int) -> int:
    """Rows that the capture buffer needs: the largest prefill, with decodes mixed in.

    SGLang's own bound forgets mixed decodes, and ``chunked_prefill_size = -1`` (then only
    ``max_prefill_tokens`` and the context bound a prefill).
    """
    schedule, ranks = get_schedule(), data_parallel_ranks()
    chunk = schedule.chunked_prefill_size
    if chunk is None or chunk <= 0:
        chunk = max(schedule.max_prefill_tokens, context_length)
    # Each rank's part is padded to a multiple of its attention-TP ranks.
    part = chunk + max_running_requests + get_parallel().attn_tp_size - 1
    return int(part * ranks)


def rows_of_all_ranks(forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None) -> int:
    """Rows of the capture buffer, from the first on, that a forward under DP attention wrote.

    The arguments are those of ``on_forward_end``: ``cuda_graph_batch`` is the batch that the last
    replayed decode graph was captured for.
    """
    lengths = forward_batch.global_num_tokens_cpu
    if not can_run_graph:
        return int(sum(lengths))
    assert cuda_graph_batch is not None
    return cuda_graph_batch * len(lengths)


def _is_owner() -> bool:
    parallel = get_parallel()
    return parallel.pp_rank == 0 and parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0
