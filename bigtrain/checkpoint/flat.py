"""Flat shards: a rank holds a contiguous range of a tensor's elements, which may begin and end inside a row.

ZeRO concatenates the flattened parameters and cuts the result into equal parts, so a rank's shard of a matrix is not a
rectangle. DCP checkpoints consist of rectangles. A range is therefore cut into the fewest rectangles that cover it; for
a matrix: the end of a row, complete rows, the beginning of a row. Each is a view of DeepSpeed's own memory: nothing is
copied or gathered. Under tensor parallelism the flattened tensors are this rank's shards of the matrices, so a range
lies in a `Box` of the full tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a rectangle in a tensor, one number for each dimension."""


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> list[Rectangle]:
    """The rectangles that consist of elements [begin, end) of a tensor in row-major order, in this order."""
    if begin >= end:
        return []
    if len(shape) <= 1:
        return [((begin,) * len(shape), (end - begin,) * len(shape))]
    row = math.prod(shape[1:])

    def inside(index: int, first: int, last: int) -> list[Rectangle]:
        return [((index, *offset), (1, *sizes)) for offset, sizes in rectangles(shape[1:], first, last)]

    first, last = -(-begin // row), end // row
    if first > last:
        return inside(last, begin - last * row, end - last * row)
    pieces = inside(first - 1, begin - (first - 1) * row, row) if begin % row else []
    if first < last:
        pieces.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return pieces + (inside(last, 0, end - last * row) if end % row else [])


@dataclass(frozen=True)
class Box:
    """A rectangle inside a tensor: its offsets and sizes, one number for each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


class FlatPart(Tensor):
    """A tensor of full shape and dtype of which this rank holds a range: `local` (1-D), the elements from `begin` on.

    It has the same role in a state as a DTensor: it is saved, and loaded in place. It supports no arithmetic. It
    implements the protocol by which torch.distributed.checkpoint requests pieces of a tensor.
    """

    local: Tensor
    begin: int
    box: Box
    written: bool

    @staticmethod
    def __new__(
        cls,
        local: Tensor,
        begin: int,
        shape: torch.Size | tuple[int, ...],
        box: Box | None = None,
        written: bool = True,
    ) -> FlatPart:
        """Create a FlatPart of a tensor of `shape`.

        Args:
            local: 1-D tensor of this rank's elements. It shares its memory: a save reads it, and a load writes it.
            begin: Index of the first element in the box, in row-major order.
            shape: Shape of the full (unsharded) tensor.
            box: The rectangle that was flattened; None: the full tensor.
            written: Whether a save writes these elements; False for a further copy, which is only loaded.
        """
        part: FlatPart = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=local.dtype, device=local.device
        )
        part.local, part.begin, part.written = local.detach(), begin, written
        part.box = Box((0,) * len(shape), tuple(shape)) if box is None else box
        return part

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            part = args[0]
            return FlatPart(part.local, part.begin, part.shape, part.box, part.written)
        raise TypeError(f"{function} on a FlatPart: it is saved and loaded, not computed with")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FlatPart({tuple(self.shape)}, {self.begin}:{self.begin + self.local.numel()})"

    def pieces(self) -> list[tuple[Rectangle, Tensor]]:
        """The rectangles of the full tensor that this rank holds, in row-major order, each with its view of `local`."""
        cut, start = [], 0
        for inside, sizes in rectangles(self.box.shape, self.begin, self.begin + self.local.numel()):
            offset = tuple(first + at for first, at in zip(self.box.offset, inside, strict=True))
            count = math.prod(sizes)
            cut.append(((offset, sizes), self.local.narrow(0, start, count).view(sizes)))
            start += count
        return cut

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for (offset, sizes), _ in self.pieces()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        if not self.written:
            return []
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for (offset, _), view in self.pieces():
            if index.offset is not None and tuple(index.offset) == offset:
                return view
        raise ValueError(f"this rank holds no piece of {index.fqn!r} at {index.offset}")
