"""The terms of a rank's peak memory."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Memory:
    """Peak memory of one rank in bytes, by term.

    gradient_buffers, activations, working and logits are those of the moment that needs most memory: the loss, the
    backward pass of a block, or the end of the backward pass.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    """Gathered parameters in the matmuls' dtype: the root, the current block and the next one; with pipeline
    parallelism the full stage."""
    gradient_buffers: int = 0
    """Unsharded gradients before they are reduced; with pipeline parallelism those of the stage."""
    activations: int = 0
    """What blocks keep for their backward pass, for all passes in flight."""
    messages: int = 0
    """Receive buffers for the neighbouring stages; torch's pipeline has one for each micro-batch of a step."""
    working: int = 0
    """Recomputed activations of one block, and temporary tensors of its backward pass."""
    logits: int = 0
    """A chunk of logits, and the gradients that the loss computes."""
    runtime: int = 0
    """CUDA's context, communication buffers and workspaces."""

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return sum(getattr(self, one.name) for one in fields(self))

    @property
    def largest(self) -> str:
        """Name of the largest term."""
        return max((one.name for one in fields(self)), key=lambda name: getattr(self, name))

    def plain(self) -> dict[str, int]:
        """The terms and their total by name, for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"total": self.total}


@dataclass(frozen=True)
class Buffers:
    """Bytes of an engine's buffers for parameters and gradients."""

    gathered: int
    """Gathered parameters."""
    whole: int = 0
    """Unsharded gradients that exist during a full step."""
    block: int = 0
    """Unsharded gradients of the block whose backward pass ends."""
    root: int = 0
    """Unsharded gradients of parameters outside of blocks, at the end of the backward pass."""
    added: int = 0
    """New gradients of a block at the end of its backward pass, before they are added to those of the step."""


@dataclass(frozen=True)
class Moment:
    """Bytes that exist at one moment: in the loss, in the backward pass of a block, or at its end."""

    gradient_buffers: int
    activations: int = 0
    working: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return self.gradient_buffers + self.activations + self.working + self.logits
