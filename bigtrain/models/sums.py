"""What a step adds up: over micro-batches and ranks, in all and by source of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigtrain.models.contract import Batch, LossSum

SOURCES = "sources"
"""The array of a batch, FP32 (B, S), that says by a one which of S sources each sequence is of; none where S is 1."""


def by_sequence(losses: Tensor, weights: Tensor) -> Tensor:
    """`LossSum.by_sequence` from weighted losses and weights, each (B, ...)."""
    parts = (losses.detach(), weights)
    return torch.stack([part.reshape(part.shape[0], -1).sum(dim=1, dtype=torch.float32) for part in parts], dim=1)


def zero_sums(micro_batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
    """float64 (2 + 2 S,): (loss, weight), and the same of each source, of no micro-batch yet."""
    sources = micro_batches[0].get(SOURCES) if micro_batches else None
    return torch.zeros(2 if sources is None else 2 + 2 * sources.shape[1], dtype=torch.float64, device=device)


def add_sums(sums: Tensor, result: LossSum, batch: Batch) -> None:
    """Add a micro-batch to `zero_sums`, in place."""
    sums[:2] += torch.stack([result.loss.detach(), result.weight]).double()
    if result.by_sequence is not None and SOURCES in batch and len(sums) > 2:
        sums[2:] += (batch[SOURCES].double().t() @ result.by_sequence.double()).flatten()
