"""Sums of losses and weights over the micro-batches and ranks of a step, in total and for each data source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigtrain.models.contract import Batch, LossSum

SOURCES = "sources"
"""Name of a batch array, FP32 (B, S): each row is one-hot and names which of S data sources the sequence comes from.
A batch of a single source does not have this array."""


def by_sequence(losses: Tensor, weights: Tensor) -> Tensor:
    """The value of `LossSum.by_sequence`, FP32 (B, 2), from weighted losses and weights, each (B, ...)."""
    parts = (losses.detach(), weights)
    return torch.stack([part.reshape(part.shape[0], -1).sum(dim=1, dtype=torch.float32) for part in parts], dim=1)


class Sums:
    """Running sums of loss and weight over micro-batches, in total and by source; float64, without gradient."""

    def __init__(self, device: torch.device, sources: int = 0) -> None:
        """Start all sums at zero.

        Args:
            sources: Number of data sources to sum separately; 0: only the totals.
        """
        self.vector = torch.zeros(2 + 2 * sources, dtype=torch.float64, device=device)
        """Shape (2 + 2 * sources,): total loss and weight, then loss and weight of each source."""
        self._total, self._by_source = self.vector[:2], self.vector[2:].view(sources, 2)

    @classmethod
    def of(cls, micro_batches: Sequence[Mapping[str, Any]], device: torch.device) -> Sums:
        """Sums of zero, for as many sources as these micro-batches distinguish."""
        sources = micro_batches[0].get(SOURCES) if micro_batches else None
        return cls(device, 0 if sources is None else sources.shape[1])

    @property
    def loss(self) -> Tensor:
        """Scalar: the sum of losses."""
        return self._total[0]

    @property
    def weight(self) -> Tensor:
        """Scalar: the sum of weights."""
        return self._total[1]

    def add(self, result: LossSum, batch: Batch) -> None:
        """Add the loss and the weight of one micro-batch."""
        self._total += torch.stack([result.loss.detach(), result.weight]).double()
        if result.by_sequence is not None and SOURCES in batch and len(self._by_source):
            self._by_source += batch[SOURCES].double().t() @ result.by_sequence.double()
