"""The terms of a rank's memory at its peak."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, by term."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    """Parameters in the computing precision: root, the block at work and the next; in a pipeline the whole stage."""
    gradient_buffers: int = 0
    """Whole gradients before they are reduced; in a pipeline those of the stage. These, activations, working and logits
    are those of the moment that takes most: the loss, a block's backward pass, or the end of the backward pass."""
    activations: int = 0
    """What blocks keep for their backward pass, of all passes in flight."""
    messages: int = 0
    """What a stage receives from its neighbours: torch's pipeline keeps a buffer for each micro-batch of a step."""
    working: int = 0
    """What one block computes again and its backward pass holds."""
    logits: int = 0
    """A chunk of logits, and the gradients that the loss makes."""
    runtime: int = 0

    @property
    def total(self) -> int:
        """All."""
        return sum(getattr(self, one.name) for one in fields(self))

    @property
    def largest(self) -> str:
        """The term that takes most."""
        return max((one.name for one in fields(self)), key=lambda name: getattr(self, name))

    def plain(self) -> dict[str, int]:
        """By name, for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"total": self.total}


@dataclass(frozen=True)
class Buffers:
    """Bytes beside the states that the engine holds."""

    gathered: int
    whole: int = 0
    """Gradients that are whole throughout a step."""
    block: int = 0
    """Those of the block whose backward pass ends."""
    root: int = 0
    """Those of what is in no block, after the last block's."""
    added: int = 0
    """Those of a block, when its backward pass has let go of all else, before they are added to the whole ones."""


@dataclass(frozen=True)
class Moment:
    """What exists together: in the loss, in a block's backward pass, or at the end of the backward pass."""

    gradient_buffers: int
    activations: int = 0
    working: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All."""
        return self.gradient_buffers + self.activations + self.working + self.logits
