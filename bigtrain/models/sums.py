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


class Sums:
    """Loss and weight of micro-batches, in all and by source; float64, without gradient."""

    def __init__(self, device: torch.device, sources: int = 0) -> None:
        """Of no micro-batch yet."""
        self.vector = torch.zeros(2 + 2 * sources, dtype=torch.float64, device=device)
        """Loss and weight of all, then of each source."""
        self._total, self._by_source = self.vector[:2], self.vector[2:].view(sources, 2)

    @classmethod
    def of(cls, micro_batches: Sequence[Mapping[str, Any]], device: torch.device) -> Sums:
        """Zeros for as many sources as these micro-batches distinguish."""
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
        """Add a micro-batch."""
        self._total += torch.stack([result.loss.detach(), result.weight]).double()
        if result.by_sequence is not None and SOURCES in batch and len(self._by_source):
            self._by_source += batch[SOURCES].double().t() @ result.by_sequence.double()
