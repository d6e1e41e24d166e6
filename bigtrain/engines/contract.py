"""What the trainer knows of an engine."""

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
    """Loss and weight of each source of a mixture; weights of 0 where the model does not report losses by sequence."""

    metrics: Mapping[str, Value] = field(default_factory=dict)
    """What was recorded by name (`bigtrain.metrics`)."""

    unknown: float = 0.0
    """How many ranks have recorded metrics that the others do not know yet: `StepReducer.agree` exchanges them."""

    @property
    def overflowed(self) -> bool:
        """Whether it was skipped for no other reason than a loss scale that was too large, and is now smaller."""
        return bool(self.skipped and self.weight) and math.isfinite(self.loss) and (self.loss_scale or 0.0) > 1.0


@dataclass(frozen=True)
class Totals:
    """What an evaluation sums over its batches and all ranks; equal on each of them."""

    loss: float = 0.0
    """Sum of losses."""

    weight: float = 0.0
    """Sum of weights."""

    metrics: Mapping[str, Value] = field(default_factory=dict)
    """What the model and the evaluators recorded by name."""

    sources: tuple[tuple[float, float], ...] = ()
    """Loss and weight of each of `Measuring.sources`."""

    @property
    def sums(self) -> tuple[float, float]:
        """Loss and weight."""
        return self.loss, self.weight

    @property
    def mean_loss(self) -> float | None:
        """Loss over weight; None where no token counts."""
        return self.loss / self.weight if self.weight else None


@dataclass(frozen=True)
class Measuring:
    """What evaluators want of an evaluation beside its losses."""

    wanted: frozenset[str] = frozenset()
    """Metrics that the model records only where they are requested (`metrics.wants_metric`)."""

    passes: tuple[Callable[[Any, dict[str, Tensor]], None], ...] = ()
    """Called with the model and each micro-batch on the device; they record metrics. Not with pipeline stages."""

    sources: int = 0
    """Number of sources in the batches' array `sources`; the engine returns the sums of each."""


ONLY_LOSSES: Final = Measuring()


class StepResult:
    """The numbers of a step, still on the device: reading them is what waits for it, not the step itself.

    Args:
        numbers: float64, on the device. Their copy to the host starts at once.
        decode: What the numbers mean, once they are on the host.
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
        """Wait for the step where needed, and return its numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._decode(self._host.tolist())


class Engine(Protocol):
    """Executes steps. The same batch gives the same numbers under every engine and layout."""

    device: torch.device
    """Where this rank computes."""
    data_parallel_rank: int
    data_parallel_size: int
    reducer: StepReducer
    """What it sums its steps and evaluations with; its recorder takes metrics for the next step."""

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """One optimizer step on this rank's part of the global batch.

        The gradient is that of the sum of losses over the global sum of weights, whatever the number of passes and
        ranks; it is clipped by its global norm. Where it or the loss is not finite on any rank, or no token of the
        global batch counts, no rank updates anything: the step's one all-reduce decides it, without the host. `vote`
        and recorded metrics travel in the same all-reduce, so all ranks act on a vote at the same step.
        """
        ...

    def evaluate(self, batches: Iterator[list[MicroBatch]], measuring: Measuring = ONLY_LOSSES) -> Totals:
        """Sums over the batches and all ranks, without gradients.

        Args:
            measuring: What evaluators want beside the losses.
        """
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


@runtime_checkable
class RecordsNorms(Protocol):
    """An engine that records norms of gradients, weights and updates; its section says `records_norms`."""

    def record_norms(self, every: int, depth: int, kinds: Sequence[Kind]) -> None:
        """Record named metrics from the next step on; see `engines.norms.Norms`."""
        ...
