"""Comparing the copies of a tensor that several ranks hold, which finds a bit that has flipped in one of them.

Replicas of FSDP's shards, copies under tensor parallelism and step counts must be bitwise equal. Each rank sends one
64-bit checksum for each piece, so the cost is one read of the copies on the device.
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
"""A tensor's name, and the offset of the piece in it, one number for each dimension."""


class ReplicasDifferError(RuntimeError):
    """Two ranks hold different bits of the same piece, so one of them computes with a damaged copy."""


def check_replicas(ranks: RankGroup, state: Mapping[str, Tensor]) -> None:
    """Compare the pieces of tensors that several ranks hold. Collective.

    Raises:
        ReplicasDifferError: Copies of a piece differ. The error is raised on all ranks, and names the tensor and the
            ranks that differ from the majority.
    """
    if ranks.size == 1:
        return
    pieces = dict(_copies(state))
    sums: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in pieces.values():
        sums[tensor.device].append(_sum(tensor))
    # The host waits once for each device: step counts may be on the CPU.
    read = {device: iter(torch.stack(found).tolist()) for device, found in sums.items()}
    values = [next(read[tensor.device]) for tensor in pieces.values()]
    collected = ranks.collect(dict(zip(pieces, values, strict=True)))
    problem = ranks.share(_compare(collected) if ranks.first else None)
    if problem:
        raise ReplicasDifferError(problem)


def _copies(state: Mapping[str, Tensor]) -> Iterator[tuple[Piece, Tensor]]:
    """This rank's pieces of which other ranks may hold a copy."""
    for name, tensor in state.items():
        if isinstance(tensor, FlatPart):
            yield from (((name, offset), view) for (offset, _), view in tensor.pieces())
        elif not isinstance(tensor, DTensor):
            yield (name, (0,) * tensor.ndim), tensor.detach()
        elif any(placement.is_replicate() for placement in tensor.placements):
            for chunk in tensor.__create_chunk_list__():
                yield (name, tuple(chunk.offsets)), tensor.to_local().detach()


def _sum(tensor: Tensor) -> Tensor:
    """Checksum of a tensor: the sum of its elements' bits, read as integers; one flipped bit changes it."""
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
            others = "the others" if certain else "each other, and no majority shows which copy is correct"
            plural = "s" if len(odd) > 1 else ""
            return (
                f"rank{plural} {', '.join(map(str, odd))}: {name!r} at {list(offset)} differs in its bits from {others}"
            )
    return None
