"""Chunk sizes of `loss.chunked_cross_entropy`. Does not import torch, because planning uses it too."""

from __future__ import annotations

CPU_CHUNK_LOGITS = 1 << 24
"""Number of logits of a chunk on a CPU: 64 MiB in FP32. Measured: smaller chunks gain nothing from the cache."""
GPU_CHUNK_LOGITS = 1 << 28
"""Number of logits of a chunk on other devices: 1 GiB in FP32, large enough that matmuls run at full speed."""
MIN_CHUNK_TOKENS = 256


def chunk_tokens(rows: int, on_cpu: bool) -> int:
    """Number of tokens of one chunk, for a head with `rows` rows."""
    return max(MIN_CHUNK_TOKENS, (CPU_CHUNK_LOGITS if on_cpu else GPU_CHUNK_LOGITS) // rows)
