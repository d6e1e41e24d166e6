"""The least memory of a trial. A trial that can never fit is refused before the sweep spends anything on it."""

from __future__ import annotations

from bigtrain.run import RunConfig

ADAM_BYTES = 16
"""Bytes per parameter: the parameter, its gradient and Adam's two moments, each in FP32."""


def least_memory_bytes(config: RunConfig, vocab_size: int) -> int:
    """Bytes of parameters, gradients and optimizer state over all ranks, without activations."""
    return ADAM_BYTES * config.model.parameter_count(vocab_size)
