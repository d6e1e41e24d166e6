"""Records every collective that this rank issues, in order: kind, axes of the mesh, bytes.

    with RecordedCollectives(sizes) as record:
        engine.train_step(step, micro_batches, lr)
    assert Counter(record) == total(communication(...))
    assert not record.missed

Collectives are intercepted in torch's dispatcher, so it does not matter who issues them: bigtrain, FSDP2's hooks,
DTensor's redistributions, DeepSpeed, DDP's C++ reducer, or the pipeline's sends. On a CPU the backward pass runs in the
calling thread and is recorded too. Each gloo group counts its collectives, which proves that the record is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.parallel.config import Mesh
from bigtrain.planning.communication import ENDS, Collective, Kind

KINDS: dict[str, Kind] = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_reduce_coalesced_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}
"""Kind of collective of each operator in torch's namespaces c10d and _c10d_functional."""
NO_EXCHANGE = ("wait_tensor", "_wrap_tensor_autograd")
"""Operators of _c10d_functional that communicate nothing."""


class RecordedCollectives(TorchDispatchMode):
    """The collectives that this rank issues inside the `with` block."""

    def __init__(self, sizes: Mesh) -> None:
        """Prepare the names of the groups.

        Args:
            sizes: Sizes of the mesh axes, which give groups their names.
        """
        super().__init__()
        self.missed: dict[tuple[str, ...], int] = {}
        """Number of collectives that gloo has run but that were not recorded, by axes; set at the end of the block."""
        self._names = _axes_by_ranks(sizes)
        self._seen: list[Collective] = []
        self._of_group: dict[str, int] = {}
        self._begun: dict[str, int] = {}

    def __iter__(self) -> Iterator[Collective]:
        """The collectives in the order in which they were issued."""
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __enter__(self) -> Self:
        self._begun = {group.group_name: _count(group) for group in _gloo_groups()}
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for group in _gloo_groups():
            name = group.group_name
            ran = _count(group) - self._begun.get(name, 0)
            if unseen := ran - self._of_group.get(name, 0):
                axes = self._axes(group)
                self.missed[axes] = self.missed.get(axes, 0) + unseen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # DTensor handles the operator first; the collectives that it issues are dispatched here too.
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            self._record(name, _group_of(args, kwargs), _tensors([*args, *kwargs.values()]))
        elif func.namespace == "_c10d_functional" and name not in NO_EXCHANGE:
            group = dist.distributed_c10d._resolve_process_group(cast(Any, _name_of_group(args, kwargs)))
            self._record(name, group, _tensors([*args, *kwargs.values(), result]))
        return result

    def _record(self, name: str, group: dist.ProcessGroup, tensors: list[Tensor | list[Tensor]]) -> None:
        if name not in KINDS:
            raise RuntimeError(f"this version of torch has a collective that is not known here: {name}")
        kind = KINDS[name]
        size = 0 if kind == "barrier" else max(_bytes(tensor) for tensor in tensors)
        self._seen.append(Collective(kind, self._axes(group), size))
        self._of_group[group.group_name] = self._of_group.get(group.group_name, 0) + 1

    def _axes(self, group: dist.ProcessGroup) -> tuple[str, ...]:
        ranks = tuple(dist.get_process_group_ranks(group))
        return self._names.get(ranks, tuple(f"rank {rank}" for rank in ranks))


def _axes_by_ranks(sizes: Mesh) -> dict[tuple[int, ...], tuple[str, ...]]:
    """The axes that each possible group spans, by its ranks; axes of size 1 are omitted."""
    large = [axis for axis, size in asdict(sizes).items() if size > 1]
    places = [sizes.coordinates(rank) for rank in range(sizes.world_size)]
    names: dict[tuple[int, ...], tuple[str, ...]] = {}
    for chosen in range(1 << len(large)):
        spanned = tuple(axis for bit, axis in enumerate(large) if chosen >> bit & 1)
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            groups.setdefault(tuple(place[axis] for axis in large if axis not in spanned), []).append(rank)
        names |= {tuple(ranks): spanned for ranks in groups.values()}
        if spanned == ("pp",) and sizes.pp > 2:
            names |= {(ranks[0], ranks[-1]): ENDS for ranks in groups.values()}
    return names


def _gloo_groups() -> list[dist.ProcessGroup]:
    """This rank's groups with the backend gloo, which count their collectives."""
    if not dist.is_initialized():
        return []
    groups = list(dist.distributed_c10d._world.pg_map)
    return [group for group in groups if "gloo" in str(dist.get_backend(group))]


def _count(group: Any) -> int:
    """Number of collectives and messages that a gloo group has begun."""
    return int(group._get_sequence_number_for_group())


def _group_of(args: Any, kwargs: Any) -> dist.ProcessGroup:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    raise RuntimeError("a collective without a group")


def _name_of_group(args: Any, kwargs: Any) -> str:
    """The group's name: the last string among a functional collective's arguments."""
    names = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
    return names[-1]


def _tensors(values: list[Any]) -> list[Tensor | list[Tensor]]:
    """The tensors, and the lists of tensors, among some values; a list counts as one buffer."""
    found: list[Tensor | list[Tensor]] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple) and value:
            inner = [tensor for one in value for tensor in (one if isinstance(one, list | tuple) else [one])]
            if all(isinstance(tensor, Tensor) for tensor in inner):
                found.append(inner)
    return found


def _bytes(value: Tensor | list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in value) if isinstance(value, list) else value.nbytes
