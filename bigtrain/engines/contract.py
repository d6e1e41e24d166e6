"""The interface between the trainer and an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bigtrain.metrics import Value

if TYPE_CHECKING:
    from bigtrain.engines.norms import Kind
    from bigtrain.engines.step import StepReducer

MicroBatch = dict[str, np.ndarray]
"""The named arrays of one micro-batch on one rank, as the loader yields them."""


@dataclass(frozen=True)
class StepNumbers:
    """The results of one step, reduced over all ranks; equal on all ranks."""

    loss: float
    """Sum of the losses of the global batch, in nats for text."""

    weight: float
    """Sum of the weights of the global batch: the number of tokens (or images) that count in the loss."""

    gradient_norm: float
    """Norm of the gradient of loss / weight, before clipping."""

    votes: float
    """Sum of the `vote` arguments of all ranks."""

    skipped: float = 0.0
    """1 if the update was skipped, because the loss or gradient was not finite or no token counted; else 0."""

    loss_scale: float | None = None
    """Loss scale of the step (FP16); None for other precisions."""

    sources: tuple[tuple[float, float], ...] = ()
    """Loss and weight of each source of a mixture. The weights are 0 if the model reports no losses by sequence."""

    metrics: Mapping[str, Value] = field(default_factory=dict)
    """Metrics that were recorded, by name (`bigtrain.metrics`)."""

    unknown: float = 0.0
    """Number of ranks that recorded metrics which not all ranks know yet; `StepReducer.agree` exchanges their names."""

    @property
    def overflowed(self) -> bool:
        """Whether the step was skipped only because the loss scale was too large; the scale is now smaller."""
        return bool(self.skipped and self.weight) and math.isfinite(self.loss) and (self.loss_scale or 0.0) > 1.0


@dataclass(frozen=True)
class Totals:
    """The results of an evaluation, summed over its batches and all ranks; equal on all ranks."""

    loss: float = 0.0
    """Sum of losses."""

    weight: float = 0.0
    """Sum of weights."""

    metrics: Mapping[str, Value] = field(default_factory=dict)
    """Metrics that the model and the evaluators recorded, by name."""

    sources: tuple[tuple[float, float], ...] = ()
    """Sum of losses and sum of weights of each source; `Measuring.sources` is their number."""

    @property
    def sums(self) -> tuple[float, float]:
        """Sum of losses and sum of weights."""
        return self.loss, self.weight

    @property
    def mean_loss(self) -> float | None:
        """Mean loss: loss / weight; None if no token counts."""
        return self.loss / self.weight if self.weight else None


@dataclass(frozen=True)
class Measuring:
    """The measurements that evaluators request from an evaluation in addition to the loss."""

    wanted: frozenset[str] = frozenset()
    """Names of metrics that the model records only on request (`metrics.wants_metric`)."""

    passes: tuple[Callable[[Any, dict[str, Tensor]], None], ...] = ()
    """Functions that are called with the model and each micro-batch on the device, and record metrics. They are not
    called under pipeline parallelism."""

    sources: int = 0
    """Number of sources in the batches' array `sources`; the engine returns the sums of each source."""


ONLY_LOSSES: Final = Measuring()


class StepResult:
    """The results of a step, still on the device. The host waits for the device only when `read` is called.

    Args:
        numbers: 1-D float64 tensor on the device. Its asynchronous copy to the host starts at once.
        decode: Function that converts the values, once they are on the host, to `StepNumbers`.
    """

    def __init__(self, numbers: Tensor, decode: Callable[[list[float]], StepNumbers]) -> None:
        self._decode = decode
        self._event = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = numbers

    def read(self) -> StepNumbers:
        """Wait until the step's results are on the host, and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._decode(self._host.tolist())


class Engine(Protocol):
    """Executes training steps and evaluations. The same batch gives the same results under every engine and layout."""

    device: torch.device
    """The device on which this rank computes."""
    data_parallel_rank: int
    data_parallel_size: int
    reducer: StepReducer
    """Reduces the results of steps and evaluations over the ranks. Its recorder takes metrics for the next step."""

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """Run one optimizer step on this rank's part of the global batch.

        The gradient is that of the global sum of losses, divided by the global sum of weights, for any number of
        micro-batches and ranks. It is clipped by its global norm. If the gradient or the loss is not finite on any
        rank, or no token of the global batch counts, no rank updates anything. The step's one all-reduce decides this
        on the device, without the host. The same all-reduce sums `vote` and the recorded metrics, so all ranks act on
        a vote at the same step.

        Args:
            step: Number of steps that precede this one.
            micro_batches: This rank's micro-batches.
            vote: Summed over the ranks to `StepNumbers.votes`.
        """
        ...

    def evaluate(self, batches: Iterator[list[MicroBatch]], measuring: Measuring = ONLY_LOSSES) -> Totals:
        """Run the forward pass on all batches, and sum the results over the batches and all ranks.

        Args:
            measuring: What evaluators request in addition to the loss.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """This rank's shards of parameters and optimizer state, by qualified name, to be saved or loaded in place."""
        ...

    def memory_bytes(self) -> int:
        """Peak memory of this rank in bytes: of its GPU, or of the process on a CPU."""
        ...

    def close(self) -> None:
        """Release process groups and devices."""
        ...


@runtime_checkable
class Reloaded(Protocol):
    """An engine that computes with copies of the tensors in its `state`."""

    def state_loaded(self) -> None:
        """Update the copies from `state`. Collective; to be called after each load into `state`."""
        ...


@runtime_checkable
class RecordsNorms(Protocol):
    """An engine that records norms of gradients, weights and updates; its section sets `records_norms`."""

    def record_norms(self, every: int, depth: int, kinds: Sequence[Kind]) -> None:
        """Record norms as named metrics from the next step on; see `engines.norms.Norms` for the arguments."""
        ...
