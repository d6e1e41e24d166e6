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
    """FP32 (B, 2): loss and weight of each sequence, without gradient. A model may omit it; then the losses of a
    mixture's sources are not reported."""


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
    """An nn.Module with parameters in FP32, and matmuls and residual stream in `compute_dtype`."""

    compute_dtype: torch.dtype
    """Set by the engine; float32 until then. Weights and rotary tables must reach the model in FP32, so
    FSDP's mixed precision is used with cast_forward_inputs=False."""

    def forward(self, batch: Batch) -> LossSum:
        """The sums of losses and weights of one micro-batch, without a host synchronisation."""
        ...

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Qualified names and modules of the blocks, in order; each is sharded, recomputed and compiled separately."""
        ...

    def initialisers(self) -> dict[str, Init]:
        """The initialisation rule of each parameter, by qualified name; a tied parameter has only its first name."""
        ...


class Splittable(Model, Protocol):
    """A model whose matrices can be split over the ranks of a tensor-parallel group."""

    def tensor_plan(self) -> dict[str, TensorRole]:
        """How each parameter is split, by patterns over qualified names; the first matching pattern applies."""
        ...


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: one or more consecutive blocks of a model.

    The first stage also holds the modules before all blocks, the last stage those after them.
    """

    first: int
    """Index of the stage's first block, from 0."""
    last: int
    """Index of the stage's last block, plus one."""
    blocks: int
    """Number of blocks of the full model, over all stages."""

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage, which embeds the batch."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage, which computes the loss."""
        return self.last == self.blocks


class Staged(Model, Protocol):
    """A model that can be cut between its blocks into pipeline stages."""

    def keep(self, stage: Stage) -> None:
        """Drop, in place, all modules that the stage does not hold; the others keep their qualified names.

        A parameter that the first and the last stage need, such as a tied embedding, stays on both under one name.
        """
        ...

    def forward_stage(self, x: Tensor | None, batch: Batch) -> Tensor | LossSum:
        """Run this stage's part of the forward pass.

        Args:
            x: The residual stream that the previous stage returned; None on the first stage.
            batch: The full micro-batch, on every stage.

        Returns:
            The sums of the micro-batch on the last stage; on other stages the residual stream, in `compute_dtype` and
            of the same shape between all stages.
        """
        ...

    def stream_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of the residual stream of a micro-batch on this rank."""
        ...


class Decoder(Model, Protocol):
    """A model of tokens that can generate text."""

    context: int

    def logits(self, batch: Batch) -> Tensor:
        """FP32 logits (B, C, vocabulary) for `batch["tokens"]` (B, C)."""
        ...
