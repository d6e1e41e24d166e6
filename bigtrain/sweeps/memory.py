"""The least that a trial holds in memory, so that one that can never fit is refused before anything is spent."""

from __future__ import annotations

from bigtrain.run import RunConfig

ADAM_BYTES = 16
"""Of each parameter: itself, its gradient and Adam's two moments in FP32."""


def least_memory_bytes(config: RunConfig, vocab_size: int) -> int:
    """Bytes of parameters, gradients and optimizer over all ranks; activations come on top."""
    return ADAM_BYTES * config.model.parameter_count(vocab_size)
