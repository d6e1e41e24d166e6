"""Checks from one rank's state that the ranks' parts of a checkpoint cover each tensor exactly once.

The parts of other ranks are computed by the call that those ranks would make, with their coordinates in the mesh.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.shards import local_tensors, plan_items

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part inside a tensor."""


def checkpoint_faults(state: Mapping[str, Tensor]) -> list[str]:
    """Messages about wrong parts in the plan of a checkpoint; empty if it is correct.

    Parts are wrong if they overlap, if one is missing, or if the shape of this rank's part is not that of its tensor.

    Args:
        state: The state of one rank (`Engine.state`).
    """
    local, found = local_tensors(state), []
    for item in plan_items(state):
        name, chunk = item.index.fqn, item.tensor_data.chunk  # type: ignore[union-attr]
        if name in local and isinstance(state[name], DTensor) and tuple(chunk.sizes) != tuple(local[name].shape):
            found.append(
                f"{name}: this rank holds {list(local[name].shape)}, but the plan writes {list(chunk.sizes)} at "
                f"{list(chunk.offsets)}"
            )
    seen: dict[Any, str | None] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            continue
        key = (tuple(tensor.shape), tensor.placements, tuple(tensor.device_mesh.shape), type(tensor))
        if key not in seen:
            seen[key] = cover_fault(tuple(tensor.shape), set(boxes(tensor)))
        if seen[key] is not None:
            found.append(f"{name}: {seen[key]}")
    return found


def boxes(tensor: DTensor) -> Iterator[Box]:
    """The parts of all ranks of a tensor's mesh; replicas are counted once."""
    mesh = tensor.device_mesh
    own = mesh.get_coordinate()
    assert own is not None
    ranges = [
        (own[axis],) if placement.is_replicate() else range(mesh.size(axis))
        for axis, placement in enumerate(tensor.placements)
    ]
    for place in itertools.product(*ranges):
        with _at(mesh, place):
            for chunk in tensor.__create_chunk_list__():
                if chunk.sizes.numel():
                    yield tuple(chunk.offsets), tuple(chunk.sizes)


def cover_fault(shape: tuple[int, ...], parts: set[Box]) -> str | None:
    """A message about parts that overlap, leave a gap, or exceed the tensor; None if they cover each element once."""
    ends = [
        sorted({0, size, *(at[dim] for at, _ in parts), *(at[dim] + count[dim] for at, count in parts)})
        for dim, size in enumerate(shape)
    ]
    if any(edges[-1] > size for edges, size in zip(ends, shape, strict=True)):
        return f"a part ends outside its shape {list(shape)}"
    cells = np.zeros([len(edges) - 1 for edges in ends], dtype=np.int32)
    for offsets, sizes in parts:
        cells[
            tuple(
                slice(edges.index(at), edges.index(at + count))
                for edges, at, count in zip(ends, offsets, sizes, strict=True)
            )
        ] += 1
    if cells.size and cells.max() > 1:
        return f"parts of the ranks overlap from {_first(cells > 1, ends)} on"
    if cells.size and cells.min() < 1:
        return f"no rank has the part from {_first(cells < 1, ends)} on"
    return None


def _first(cells: np.ndarray, ends: list[list[int]]) -> list[int]:
    place = np.unravel_index(int(np.argmax(cells)), cells.shape)
    return [edges[at] for edges, at in zip(ends, place, strict=True)]


@contextlib.contextmanager
def _at(mesh: DeviceMesh, place: tuple[int, ...]) -> Iterator[None]:
    """A context in which this process has other coordinates in a mesh."""
    before = mesh._coordinate_on_dim
    mesh._coordinate_on_dim = place
    try:
        yield
    finally:
        mesh._coordinate_on_dim = before
