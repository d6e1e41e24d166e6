"""Recompute (activation checkpointing): activations of a block are freed, and the backward pass computes them again.

full keeps only each block's input (Chen et al. 2016). selective also keeps results that are expensive to recompute:
matmuls, the output of attention, and what collectives received. Norms, activation functions, rotary embeddings,
dropout and sums are recomputed.

torch's own selective checkpointing keeps the outputs of selected operators. This is wrong for a collective, which
writes into memory that the second pass allocates again. It is wasteful for a matmul that is one rank's part of a sum.
So this module records results and restores them itself. In a compiled block the compiler does both.
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
    """The aten operators of these names, with all overloads, that this build of torch has."""
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
"""Operators that may occur between a matmul and the collective that sums its result over ranks."""
SUMS = frozenset({"allreduce_", "_reduce_scatter_base_"})


def recompute_blocks(
    blocks: list[nn.Module],
    recompute: Recompute,
    *,
    groups: Collection[dist.ProcessGroup] = (),
    compiled: bool = False,
) -> None:
    """Apply recompute to each block, in place. The second pass uses the random numbers of the first one.

    The blocks keep their names. FSDP's hooks on a block run once, around both passes.

    Args:
        blocks: The blocks of a model.
        recompute: `engine.recompute`.
        groups: Process groups over which a block exchanges activations. selective runs these collectives only in the
            first pass. Other collectives inside a block (of weights, under DeepSpeed) run in both passes.
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
    """The policy for compiled blocks; in the compiler's graph, collectives are functional operators."""
    keep = _is(operator, PRODUCTS | ATTENTION) or operator.namespace == "_c10d_functional"
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(groups: frozenset[str]) -> tuple[_Keep, _PutBack]:
    """The dispatch modes of the first and the second pass of one block."""
    kept: _Kept = deque()
    return _Keep(groups, kept), _PutBack(groups, kept)


_Kept = deque[tuple[Any, Any]]
"""Operators whose results are kept, with the results, in the order of the first pass."""


class _Pass(TorchDispatchMode):
    """Intercepts every operator of one pass, below autograd."""

    def __init__(self, groups: frozenset[str], kept: _Kept) -> None:
        super().__init__()
        self.groups, self.kept = groups, kept

    def is_exchange(self, operator: Any, args: tuple[Any, ...]) -> bool:
        """Whether the operator is a collective over one of the groups that exchange activations."""
        if operator.namespace != "c10d":
            return False
        group = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        return group is not None and dist.ProcessGroup.unbox(group).group_name in self.groups


class _Keep(_Pass):
    """The first pass: keeps the results of expensive operators."""

    part: Tensor | None = None
    """The newest result, if it is a matmul's and only operators of `LAYOUT` have followed; else None."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if _is(operator, PRODUCTS | ATTENTION):
            self.kept.append((operator, tree_map_only(Tensor, torch.detach, result)))
            self.part = result if _is(operator, PRODUCTS) else None
        elif self.is_exchange(operator, args):
            if self._sums_the_part(operator, args):
                # Only the sum over ranks uses the matmul's values, so the second pass needs no more than the shape.
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
    """The second pass: returns the kept results instead of running the expensive operators."""

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
    """The tensors that a collective writes, which are c10d's first argument."""
    return [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
