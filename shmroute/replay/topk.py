"""The top-k of a transformers router: which experts it chooses is decided here, nothing else.

Problem
    transformers has no place where a router's choice could come in. Its routers return scores
    that are already gathered, so the indices cannot be exchanged afterwards; and a forward may
    be computed a second time, in the backward pass (gradient checkpointing), long after whoever
    asked for the choice has gone on to other tokens.

Protocol
    1 ``moe_blocks`` finds the modules that hold ``experts`` and, in or beneath them, a router.
    2 While ``Routing.installed``, each block's ``forward`` runs under a ``TorchFunctionMode``
      that answers the one ``topk`` of the router's width and k with ``choose``'s indices and
      the router's own scores at these: what the router makes of them keeps its gradients.
    3 Checkpointed functions are wrapped when they are handed to the checkpoint, so that the
      recomputation installs the very ``Routing`` of its forward, whatever is installed by then.
    4 Checkpoints of a kind that is not known here cannot be wrapped: a block that was routed
      and is computed again in a backward pass without its routing, or in the ``with`` of
      another forward, raises.

Promise: each block's forward has exactly one such ``topk``, and each block exactly one forward,
recomputations aside; else ``ReplayError``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ReplayError

#: Where a module keeps its checkpoint function: transformers' layers, torch's CheckpointWrapper.
CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


@dataclass(frozen=True, slots=True, eq=False)
class MoeBlock:
    """The part of a decoder layer that routes: the parent of its experts."""

    layer_id: int
    path: str
    module: nn.Module
    num_experts: int
    top_k: int


#: Indices ``int64 [tokens, top_k]`` for a block, given its scores ``[tokens, num_experts]`` and a
#: function that returns the router's own.
Choose = Callable[[MoeBlock, torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor]


def moe_blocks(model: nn.Module) -> tuple[MoeBlock, ...]:
    """The model's MoE blocks by decoder-layer number.

    Raises
    ------
    ReplayError
        There are none, several in one layer, or of a kind whose routes do not say all.
    """
    if not isinstance(model, nn.Module):
        raise ReplayError(f"the model is a {type(model).__name__}: give the torch module itself")
    found = sorted(_blocks(model), key=lambda block: block.layer_id)
    if not found:
        raise ReplayError(
            f"{type(model).__name__} has no module with `experts` and a top-k router: routes can "
            "be replayed in transformers' MoE models only (5.x; older ones route elsewhere)"
        )
    for one, other in itertools.pairwise(found):
        if one.layer_id == other.layer_id:
            raise ReplayError(
                f"{one.path} and {other.path} both route in decoder layer {one.layer_id}: give "
                "the part of the model that the engine ran, not the whole"
            )
    return tuple(found)


def _blocks(model: nn.Module) -> Iterator[MoeBlock]:
    for path, module in model.named_modules():
        experts = getattr(module, "experts", None)
        numbers = [int(part) for part in path.split(".") if part.isdecimal()]
        count = getattr(experts, "num_experts", None)
        if isinstance(experts, nn.Module) and isinstance(count, int) and numbers:
            _refuse_masked_scores(path, module)
            yield MoeBlock(numbers[-1], path, module, count, _top_k(path, module))


def _top_k(path: str, block: nn.Module) -> int:
    said = (getattr(module, "top_k", None) for module in block.modules())
    values = {value for value in said if isinstance(value, int)}
    if len(values) != 1:
        raise ReplayError(f"{path} ({type(block).__name__}) does not say its top_k: {values}")
    return values.pop()


def _refuse_masked_scores(path: str, block: nn.Module) -> None:
    """DeepSeek-V2's groups: the scores of experts outside the chosen groups are zero before the
    top-k, so that a replayed expert of another group would get the weight 0.
    """
    if any(getattr(m, "topk_method", "") == "group_limited_greedy" for m in block.modules()):
        raise ReplayError(
            f"{path} ({type(block).__name__}) routes by 'group_limited_greedy': its scores are "
            "masked before the top-k, so that a replayed choice would lose its weight"
        )


class Routing:
    """One forward's choices, for its blocks and for their recomputations.

    Parameters
    ----------
    blocks
        All MoE blocks of ``model``.
    choose
        See ``Choose``; also called by recomputations, in the thread of the backward pass.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[MoeBlock], choose: Choose) -> None:
        self._model = model
        self._blocks = blocks
        self._choose = choose
        self._runs = dict.fromkeys((block.layer_id for block in blocks), 0)
        self._repeats = dict(self._runs)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Route one forward of the model; backward passes may run within or later.

        Raises
        ------
        ReplayError
            The model is routed already, or its forward was not what this is for.
        """
        self._check_alone()
        with ExitStack() as stack:
            self._install(stack, self._blocks, checkpointed=False)
            for path, module in self._model.named_modules():
                inside = [block for block in self._blocks if _is_inside(block, path)]
                if inside:
                    self._wrap_checkpoints(stack, module, inside)
            try:
                yield
            finally:  # a backward pass may come after an exception, too
                for block in self._blocks:
                    if self._runs[block.layer_id]:
                        _watch(block.module)
        self._check_all_ran()

    def run(self, routed: _RoutedForward, args: Any, kwargs: Any) -> Any:
        """A block's forward, with its choice."""
        block, forward = routed.block, routed.unrouted
        if not _in_backward():
            self._count(block)
        elif not routed.checkpointed:
            self._count_repeat(block)
        mode = _RouterTopK(block, self._choose)
        with mode:
            result = forward(*args, **kwargs)
        mode.check()
        return result

    def _install(self, stack: ExitStack, blocks: Sequence[MoeBlock], *, checkpointed: bool) -> None:
        for block in blocks:
            # Whatever is installed by now, a later micro-batch's routing too: this one counts.
            routed = _RoutedForward(self, block, _unrouted(block.module), checkpointed)
            stack.enter_context(_attribute(block.module, "forward", routed))

    def _wrap_checkpoints(
        self, stack: ExitStack, module: nn.Module, inside: Sequence[MoeBlock]
    ) -> None:
        for name in CHECKPOINTS:
            checkpoint = vars(module).get(name)
            if callable(checkpoint):
                stack.enter_context(_attribute(module, name, self._wrapped(checkpoint, inside)))

    def _wrapped(
        self, checkpoint: Callable[..., Any], inside: Sequence[MoeBlock]
    ) -> Callable[..., Any]:
        def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def routed(*inner: Any, **named: Any) -> Any:
                with ExitStack() as stack:
                    self._install(stack, inside, checkpointed=True)
                    return function(*inner, **named)

            return checkpoint(routed, *args, **kwargs)

        return wrapped

    def _count(self, block: MoeBlock) -> None:
        self._runs[block.layer_id] += 1
        if self._runs[block.layer_id] > 1:
            raise ReplayError(
                f"{block.path} ran a second time: the routes are those of one forward. Use a "
                "`with` of its own for each forward (micro-batch), and none for generate()"
            )

    def _count_repeat(self, block: MoeBlock) -> None:
        """By a checkpoint that is not wrapped: of this forward, or of one long before?"""
        self._repeats[block.layer_id] += 1
        if self._repeats[block.layer_id] > self._runs[block.layer_id]:
            raise ReplayError(
                f"{block.path} is computed again more often than its forward ran within this "
                "`with`: by a checkpoint of an earlier forward, with other routes? Call its "
                "backward() within its own `with`, or use model.gradient_checkpointing_enable()"
            )

    def _check_alone(self) -> None:
        for block in self._blocks:
            if isinstance(vars(block.module).get("forward"), _RoutedForward):
                raise ReplayError(
                    f"{block.path} is routed by another replay_routes or record_routes: one `with` "
                    "at a time (rows that are replayed need no recording)"
                )

    def _check_all_ran(self) -> None:
        idle = [layer for layer, runs in self._runs.items() if runs == 0]
        if idle:
            raise ReplayError(
                f"decoder layers {idle[:8]} ({len(idle)} of {len(self._runs)} with experts) did "
                "not run: run the model's forward within the `with`, not compiled by torch.compile"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _RoutedForward:
    """Stands for a block's ``forward`` while it is routed."""

    routing: Routing
    block: MoeBlock
    unrouted: Callable[..., Any]
    checkpointed: bool  # by a checkpoint that was wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.routing.run(self, args, kwargs)


def _unrouted(module: nn.Module) -> Callable[..., Any]:
    current: Any = module.forward
    return current.unrouted if isinstance(current, _RoutedForward) else current


class _RouterTopK(TorchFunctionMode):
    """Answers the ``topk`` over all experts; those over groups of them have another shape."""

    def __init__(self, block: MoeBlock, choose: Choose) -> None:
        super().__init__()
        self._block = block
        self._choose = choose
        self._hits = 0
        self._seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, torch.Tensor.topk):
            return func(*args, **kwargs)
        scores, top_k = _scores_and_k(*args, **kwargs)
        self._seen.append(f"top-{top_k} of {list(scores.shape)}")
        if scores.dim() != 2 or (scores.shape[1], top_k) != (
            self._block.num_experts,
            self._block.top_k,
        ):
            return func(*args, **kwargs)
        self._hits += 1
        indices = self._choose(self._block, scores, lambda: func(*args, **kwargs).indices)
        return torch.return_types.topk((scores.gather(1, indices), indices))

    def check(self) -> None:
        if self._hits == 1:
            return
        block = self._block
        raise ReplayError(
            f"{block.path} ({type(block.module).__name__}) took the top-{block.top_k} of "
            f"{block.num_experts} experts {self._hits} times in one forward, not once (its calls "
            f"of topk: {', '.join(self._seen) or 'none'}): this kind of router cannot be replayed; "
            "with use_kernels=True load the model without"
        )


def _scores_and_k(input: torch.Tensor, k: int, *_: Any, **__: Any) -> tuple[torch.Tensor, int]:
    """The arguments of ``topk`` by the names that it gives them."""
    return input, k


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give one module an attribute of its own, and take it away again."""
    own = vars(module)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def _is_inside(block: MoeBlock, path: str) -> bool:
    return not path or block.path == path or block.path.startswith(path + ".")


def _in_backward() -> bool:
    """Whether this thread runs a node of the autograd graph, so that a forward here repeats one."""
    return torch._C._current_graph_task_id() != -1


# -- computed again without its routing ------------------------------------------------------

_watched: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _watch(module: nn.Module) -> None:
    """Until the block's next forward that nobody routes, refuse to recompute it unrouted.

    Otherwise gradients would be those of other experts than the loss, without a word.
    """
    if module not in _watched:
        _watched[module] = module.register_forward_pre_hook(_refuse_unrouted)


def _refuse_unrouted(module: nn.Module, _: Any) -> None:
    if isinstance(vars(module).get("forward"), _RoutedForward):
        return
    if _in_backward():
        raise ReplayError(
            f"{type(module).__name__} is computed again in a backward pass, by a checkpoint that "
            "knows nothing of its replayed routes: call backward() within the `with`, or use "
            "model.gradient_checkpointing_enable()"
        )
    _watched.pop(module).remove()
