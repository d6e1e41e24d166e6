"""Starts a run from weights whose vocabulary has another size; each token keeps the row of its id."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bigtrain.checkpoint.huggingface import pieces
from bigtrain.models.config import ModelConfig
from bigtrain.training.config import NewRows


def resized(
    model: ModelConfig, weights: Mapping[str, Tensor], shape_of: Callable[[str], tuple[int, ...] | None]
) -> set[str]:
    """Names of the parameters with one row per vocabulary entry that have another number of rows in the source.

    Args:
        weights: This rank's parameters by qualified name.
        shape_of: Returns the shape of a parameter in the source; None if the source lacks the parameter.
    """
    found = set()
    for name, tensor in weights.items():
        stored = shape_of(name) if model.has_vocabulary_rows(name) else None
        if stored is not None and stored[0] != tensor.shape[0] and stored[1:] == tuple(tensor.shape[1:]):
            found.add(name)
    return found


@torch.no_grad()
def fill_rows(tensor: Tensor, source: Tensor, rule: NewRows) -> None:
    """Copy the source's rows into this rank's shard of a parameter, by row number, and initialize the new rows.

    Args:
        tensor: The parameter in any layout, with its initial values from the seed.
        source: The full (unsharded) parameter of the source, on the CPU; surplus rows are dropped.
        rule: "mean": a new row is the mean of all rows of the source (Hewitt 2021). "seed": it keeps its values.
    """
    mean = source.double().mean(dim=0).to(source.dtype)
    for (first, *rest), (count, *sizes), target in pieces(tensor):
        columns = tuple(slice(at, at + size) for at, size in zip(rest, sizes, strict=True))
        kept = max(0, min(first + count, source.shape[0]) - first)
        target[:kept].copy_(source[(slice(first, first + kept), *columns)])
        if rule == "mean":
            target[kept:].copy_(mean[columns].expand_as(target[kept:]))
