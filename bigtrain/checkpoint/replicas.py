"""Comparing what several ranks hold of one tensor: a bit that has flipped in one copy shows nowhere else.

Replicas of FSDP's shards, copies under tensor parallelism and step counts must be equal to the bit. Ranks send one sum
of 64 bits a piece, so the cost is reading the copies once, on the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.flat import FlatPart
from bigtrain.checkpoint.ranks import RankGroup

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Piece = tuple[str, tuple[int, ...]]
"""A tensor's name, and where the piece begins in it."""


class ReplicasDifferError(RuntimeError):
    """Two ranks hold other bits of the same piece: one of them computes with a damaged copy."""


def check_replicas(ranks: RankGroup, state: Mapping[str, Tensor]) -> None:
    """Compare the pieces that several ranks hold. Collective.

    Raises:
        ReplicasDifferError: On all ranks; names the tensor, and the ranks that differ from most.
    """
    if ranks.size == 1:
        return
    pieces = dict(_copies(state))
    sums: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in pieces.values():
        sums[tensor.device].append(_sum(tensor))
    # One wait a device: step counts may lie on the CPU.
    read = {device: iter(torch.stack(found).tolist()) for device, found in sums.items()}
    values = [next(read[tensor.device]) for tensor in pieces.values()]
    collected = ranks.collect(dict(zip(pieces, values, strict=True)))
    problem = ranks.share(_compare(collected) if ranks.first else None)
    if problem:
        raise ReplicasDifferError(problem)


def _copies(state: Mapping[str, Tensor]) -> Iterator[tuple[Piece, Tensor]]:
    """This rank's parts of tensors of which others may hold a copy."""
    for name, tensor in state.items():
        if isinstance(tensor, FlatPart):
            yield from (((name, offset), view) for (offset, _), view in tensor.pieces())
        elif not isinstance(tensor, DTensor):
            yield (name, (0,) * tensor.ndim), tensor.detach()
        elif any(placement.is_replicate() for placement in tensor.placements):
            for chunk in tensor.__create_chunk_list__():
                yield (name, tuple(chunk.offsets)), tensor.to_local().detach()


def _sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's elements as whole numbers of their bits; one flipped bit changes it."""
    flat = tensor.contiguous().view(-1)
    size = flat.element_size()
    bits = flat.view(_BITS[size]) if size in _BITS else flat.view(torch.uint8)
    return bits.sum(dtype=torch.int64)


def _compare(collected: list[dict[Piece, int]]) -> str | None:
    holders: dict[Piece, list[tuple[int, int]]] = defaultdict(list)
    for rank, sums in enumerate(collected):
        for piece, value in sums.items():
            holders[piece].append((rank, value))
    for (name, offset), held in holders.items():
        values = [value for _, value in held]
        if len(set(values)) > 1:
            usual = max(set(values), key=values.count)
            certain = values.count(usual) > len(values) / 2
            odd = [rank for rank, value in held if value != usual or not certain]
            others = "the others" if certain else "each other, and which is right is unknown"
            plural = "s" if len(odd) > 1 else ""
            return f"rank{plural} {', '.join(map(str, odd))}: other bits of {name!r} at {list(offset)} than {others}"
    return None
