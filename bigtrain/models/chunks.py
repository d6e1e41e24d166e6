"""How many tokens' logits exist at a time (`loss.chunked_cross_entropy`); without torch, since planning counts them."""

from __future__ import annotations

CPU_CHUNK_LOGITS = 1 << 24
"""Logits of a chunk on a CPU: 64 MB in FP32. Measured: smaller chunks gain nothing from the cache."""
GPU_CHUNK_LOGITS = 1 << 28
"""Logits of a chunk elsewhere: 1 GB in FP32, large enough that matmuls run at full speed."""
MIN_CHUNK_TOKENS = 256


def chunk_tokens(rows: int, on_cpu: bool) -> int:
    """Tokens of one chunk, for a head of so many rows."""
    return max(MIN_CHUNK_TOKENS, (CPU_CHUNK_LOGITS if on_cpu else GPU_CHUNK_LOGITS) // rows)
