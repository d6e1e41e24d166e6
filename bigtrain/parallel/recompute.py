"""Recompute (gradient checkpointing): activations of a block are dropped and computed again in the backward pass."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(blocks: list[nn.Module]) -> None:
    """Keep only each block's input, in place (Chen et al. 2016); the second pass draws the random bits of the first.

    The blocks' names stay, and what FSDP hangs on them runs once, around both passes.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
