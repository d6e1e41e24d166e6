"""What a built model offers to the engines, the trainer and the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from bigtrain.models.config import TensorRole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = dict[str, "Tensor"]
"""Named arrays of one micro-batch; their names and shapes depend on the kind of data."""


class LossSum(NamedTuple):
    """Sums over a micro-batch. The engine divides by the global weight; a model never scales its loss."""

    loss: Tensor
    """FP32 scalar: the sum of weighted losses, in nats."""
    weight: Tensor
    """FP32 scalar: the sum of weights."""
    by_sequence: Tensor | None = None
    """FP32 (B, 2): what each sequence adds to both, without gradient. A model may omit it: then the losses of a
    mixture's sources are not known."""


@dataclass(frozen=True)
class Normal:
    """Sampled from a normal distribution with mean 0."""

    std: float


@dataclass(frozen=True)
class Zeros:
    """All zero."""


@dataclass(frozen=True)
class Ones:
    """All one."""


Init = Normal | Zeros | Ones
"""How a parameter is initialized."""


class Model(Protocol):
    """An nn.Module: parameters stored in FP32, matmuls and residual stream in `compute_dtype`."""

    compute_dtype: torch.dtype
    """Set by the engine; float32 until then. Weights and rotary tables must reach the model in FP32, so
    FSDP's mixed precision is used with cast_forward_inputs=False."""

    def forward(self, batch: Batch) -> LossSum:
        """The sums of losses and weights of one micro-batch, without a host synchronisation."""
        ...

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Qualified names and modules, in order, that are sharded, recomputed and compiled one by one."""
        ...

    def initialisers(self) -> dict[str, Init]:
        """How each parameter, by its qualified name, is initialised; a tied one under its first name."""
        ...


class Splittable(Model, Protocol):
    """A model whose matrices several ranks can share."""

    def tensor_plan(self) -> dict[str, TensorRole]:
        """How each parameter lies, by patterns over qualified names; the first that matches counts."""
        ...


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks of a model, at least one.

    The first stage also holds what comes before all blocks, the last what comes after.
    """

    first: int
    """Number of its first block."""
    last: int
    """One past its last."""
    blocks: int
    """Blocks of the full model, over all stages."""

    @property
    def is_first(self) -> bool:
        """Whether it takes the batch itself."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes the loss."""
        return self.last == self.blocks


class Staged(Model, Protocol):
    """A model that can be cut between its blocks, so that several ranks compute one after the other."""

    def keep(self, stage: Stage) -> None:
        """Drop, in place, all that the stage does not hold; what stays keeps its qualified names.

        A parameter that both ends need, such as a tied embedding, stays at both under its one name.
        """
        ...

    def forward_stage(self, x: Tensor | None, batch: Batch) -> Tensor | LossSum:
        """From the residual stream that the stage before has returned (None on the first) to the next one's.

        Every stage is given the whole micro-batch. The last one returns its sums. The stream is in `compute_dtype`, and
        of one shape between all stages.
        """
        ...

    def stream_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of the residual stream of a micro-batch on this rank."""
        ...


class Decoder(Model, Protocol):
    """A model of tokens that can continue a text."""

    context: int

    def logits(self, batch: Batch) -> Tensor:
        """FP32 logits (B, C, vocabulary) for `batch["tokens"]` (B, C)."""
        ...
