"""What the trainer knows of an engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

MicroBatch = dict[str, np.ndarray]
"""The named arrays of one pass on one rank, as the loader yields them."""


@dataclass(frozen=True)
class StepNumbers:
    """What one step did, summed over all ranks; equal on each of them."""

    loss: float
    """Sum of the losses of the global batch, in nats for text."""

    weight: float
    """Sum of its weights: the tokens (or images) that count."""

    gradient_norm: float
    """Norm of the gradient of loss / weight, before clipping."""

    votes: float
    """Sum of what the ranks passed as `vote`."""

    skipped: float = 0.0
    """1 where loss or gradient were not finite, so that nothing was updated; else 0."""

    loss_scale: float | None = None
    """What the step was scaled by (FP16); None elsewhere."""

    sources: tuple[tuple[float, float], ...] = ()
    """Loss and weight of each source of a mixture; weights of 0 where the model does not tell sequences apart."""

    @property
    def overflowed(self) -> bool:
        """Whether it was skipped for no other reason than a loss scale that was too large, and is now smaller."""
        return bool(self.skipped) and math.isfinite(self.loss) and (self.loss_scale or 0.0) > 1.0


class StepResult:
    """The numbers of a step, still on the device: reading them is what waits for it, not the step itself."""

    def __init__(self, numbers: Tensor) -> None:
        """Take float64 (loss, weight, gradient norm, votes, skipped, loss scale or 0, then loss and weight of each
        source) and start its copy to the host."""
        self._event = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = numbers

    def read(self) -> StepNumbers:
        """Wait for the step where needed, and return its numbers."""
        if self._event is not None:
            self._event.synchronize()
        loss, weight, norm, votes, skipped, scale, *rest = self._host.tolist()
        sources = tuple(zip(rest[::2], rest[1::2], strict=True))
        return StepNumbers(loss, weight, norm, votes, skipped, scale or None, sources)


class Engine(Protocol):
    """Executes steps. The same batch gives the same numbers under every engine and layout."""

    device: torch.device
    """Where this rank computes."""
    data_parallel_rank: int
    data_parallel_size: int

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """One optimizer step on this rank's part of the global batch.

        The gradient is that of the sum of losses over the global sum of weights, whatever the number of passes and
        ranks; it is clipped by its global norm. Where it or the loss is not finite on any rank, no rank updates
        anything: that rides on the reduction of the norm, and the host is not asked. `vote` rides on the reduction that
        the step does anyway: its sum lets all ranks act on one step, without a message of its own.
        """
        ...

    def evaluate(self, batches: Iterator[list[MicroBatch]]) -> tuple[float, float]:
        """Sum of losses and sum of weights over the batches, over all ranks, without gradients."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state by qualified name, this rank's shards, to be saved or loaded in place."""
        ...

    def memory_bytes(self) -> int:
        """Peak memory of this rank: of its device, or of the process on a CPU."""
        ...

    def close(self) -> None:
        """Give back process groups and devices."""
        ...


@runtime_checkable
class Reloaded(Protocol):
    """An engine that computes with copies of what its `state` shows."""

    def state_loaded(self) -> None:
        """Take over what has been loaded into `state`. Collective; to be called after each load."""
        ...
