"""Adaptive gradient clipping (AGC): the limit of a unit's gradient is proportional to the norm of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from bigtrain.optim.clip import CLIPS, ClipConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


@CLIPS.register
class AdaptiveClip(ClipConfig):
    """Scales the gradient of each unit so that its norm is at most `ratio` times the norm of the unit's weights.

    A unit is a row of a matrix, a filter of a convolution, or a whole vector (Brock et al. 2021, eq. 3). All parameters
    are clipped; the paper excludes the last layer.
    """

    by_parameter: ClassVar[bool] = True

    name: Literal["adaptive"] = "adaptive"
    ratio: Annotated[float, Gt(0)] = 0.01
    """Largest ratio of the two norms."""
    eps: Annotated[float, Gt(0)] = 1e-3
    """Smallest norm of weights that is used, so that units of zeros can be trained."""

    def change(self, gradients: list[Tensor], parameters: list[Tensor]) -> None:
        """See `ClipConfig.change`."""
        norms = unit_norms([*gradients, *parameters])
        for gradient, norm, weight in zip(gradients, norms, norms[len(gradients) :], strict=False):
            factor = (self.ratio * weight.clamp(min=self.eps) / norm).clamp(max=1.0)
            shard = _local(gradient)
            shard.mul_(factor.to(shard.dtype).view(-1, *(1 for _ in shard.shape[1:])))


def unit_norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norms of the units of tensors, of which this rank may hold shards. Collective if units are split over ranks.

    Returns:
        For each tensor a float64 vector: the norms of its rows (slices of dimension 0) that this rank holds, or one
        norm if the tensor has fewer than two dimensions.
    """
    import torch
    import torch.distributed as dist

    squares = []
    for tensor in tensors:
        rows = _local(tensor).detach()
        rows = rows.flatten(1) if tensor.ndim > 1 else rows.view(1, -1)
        squares.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square())
    groups: dict[ProcessGroup, list[int]] = {}
    for index, tensor in enumerate(tensors):
        for group in _groups_of_units(tensor):
            groups.setdefault(group, []).append(index)
    for group, members in groups.items():
        # One all-reduce for all tensors whose units are split over the group.
        joined = torch.cat([squares[index] for index in members])
        dist.all_reduce(joined, group=group)
        for index, summed in zip(members, joined.split([len(squares[index]) for index in members]), strict=True):
            squares[index] = summed
    return [square.sqrt() for square in squares]


def _groups_of_units(tensor: Tensor) -> list[ProcessGroup]:
    """The groups of ranks that hold parts of one unit: those of mesh axes that shard a dimension inside units."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return []
    first = 1 if tensor.ndim > 1 else 0
    sharded = [getattr(placement, "dim", None) for placement in tensor.placements]
    return [tensor.device_mesh.get_group(axis) for axis, dim in enumerate(sharded) if dim is not None and dim >= first]


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
