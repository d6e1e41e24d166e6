"""Recompute (gradient checkpointing): activations of a block are dropped and computed again in the backward pass.

full keeps each block's input alone (Chen et al. 2016). selective also keeps what is expensive to make: matrix products,
attention's output, and what ranks sent each other; norms, activations, rotations, dropout and sums are computed again.

torch's own selective checkpointing keeps an operator's output by the operator's name, which is wrong for a collective
(it fills memory that the second pass allocates again) and wasteful for a product that is only a rank's part of a sum.
So what is kept and put back is recorded here; a compiled block leaves both to the compiler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from bigtrain.parallel.config import Recompute


def _operators(*names: str) -> frozenset[Any]:
    """Those of aten's operators, in all their forms, that this build of torch has."""
    return frozenset(getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name))


PRODUCTS = _operators("mm", "addmm", "_scaled_mm")
ATTENTION = _operators(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
LAYOUT = _operators(
    "view", "_unsafe_view", "transpose", "permute", "unsqueeze", "select", "slice", "detach", "clone",
    "empty", "new_empty", "empty_like",
)  # fmt: skip
"""What may stand between a product and the collective that sums it over ranks."""
SUMS = frozenset({"allreduce_", "_reduce_scatter_base_"})


def recompute_blocks(
    blocks: list[nn.Module],
    recompute: Recompute,
    *,
    groups: Collection[dist.ProcessGroup] = (),
    compiled: bool = False,
) -> None:
    """Let each block, in place, compute again what it does not keep, with the random bits of the first pass.

    The blocks' names stay, and what FSDP hangs on them runs once, around both passes.

    Args:
        recompute: `engine.recompute`.
        groups: Over which a block's activations travel; they do so once. What else travels inside a block (weights,
            under DeepSpeed) travels in both passes.
        compiled: Whether the blocks are to be compiled.
    """
    if recompute == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        names = frozenset(group.group_name for group in groups)
        options["context_fn"] = _compiled_contexts if compiled else partial(_contexts, names)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def _compiled_contexts() -> Any:
    return create_selective_checkpoint_contexts(_compiled_policy)


def _compiled_policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy for the compiler; in its graph, collectives are functions."""
    keep = _is(operator, PRODUCTS | ATTENTION) or operator.namespace == "_c10d_functional"
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(groups: frozenset[str]) -> tuple[_Keep, _PutBack]:
    """For the two passes of one block."""
    kept: _Kept = deque()
    return _Keep(groups, kept), _PutBack(groups, kept)


_Kept = deque[tuple[Any, Any]]
"""Operators and their results, in the order of the first pass."""


class _Pass(TorchDispatchMode):
    """Sees every operator of one pass, below autograd."""

    def __init__(self, groups: frozenset[str], kept: _Kept) -> None:
        super().__init__()
        self.groups, self.kept = groups, kept

    def is_exchange(self, operator: Any, args: tuple[Any, ...]) -> bool:
        """Whether ranks exchange activations."""
        if operator.namespace != "c10d":
            return False
        group = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        return group is not None and dist.ProcessGroup.unbox(group).group_name in self.groups


class _Keep(_Pass):
    """The first pass: keeps the results of what is expensive."""

    part: Tensor | None = None
    """The newest result kept, a product, while nothing but its layout has been changed since."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if _is(operator, PRODUCTS | ATTENTION):
            self.kept.append((operator, tree_map_only(Tensor, torch.detach, result)))
            self.part = result if _is(operator, PRODUCTS) else None
        elif self.is_exchange(operator, args):
            if self._sums_the_part(operator, args):
                # Its values are in the sum and nowhere else; the second pass needs the shape.
                assert self.part is not None
                self.kept[-1] = (self.kept[-1][0], self.part.new_full((), torch.nan).expand(self.part.shape))
            self.kept.append((operator, [tensor.detach() for tensor in _filled(args)]))
            self.part = None
        elif not _is(operator, LAYOUT):
            self.part = None
        return result

    def _sums_the_part(self, operator: Any, args: Any) -> bool:
        if self.part is None or operator._schema.name.removeprefix("c10d::") not in SUMS:
            return False
        summed = args[1] if operator._schema.name.endswith("scatter_base_") else args[0]
        return sum(tensor.numel() for tensor in tree_leaves(summed)) == self.part.numel()


class _PutBack(_Pass):
    """The second pass: puts the results that were kept in place of the work."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is(operator, PRODUCTS | ATTENTION):
            return self._next(operator)
        if self.is_exchange(operator, args):
            filled = _filled(args)
            for tensor, values in zip(filled, self._next(operator), strict=True):
                tensor.copy_(values)
            done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
            done.set_result(filled)
            work = torch._C._distributed_c10d._create_work_from_future(done).boxed()  # type: ignore[attr-defined]
            return work if len(operator._schema.returns) == 1 else (args[0], work)
        return operator(*args, **(kwargs or {}))

    def _next(self, operator: Any) -> Any:
        kept, result = self.kept.popleft() if self.kept else (None, None)
        if kept is not operator:
            raise RuntimeError(f"the second pass of a block calls {operator}, where the first had {kept}")
        return result


def _is(operator: Any, kinds: frozenset[Any]) -> bool:
    return getattr(operator, "overloadpacket", None) in kinds


def _filled(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a collective writes: c10d names them first."""
    return [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
