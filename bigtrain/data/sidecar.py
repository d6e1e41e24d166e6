"""Sidecars: one int64 .npy array per shard, with one row per sample. The sample kind defines the columns."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigtrain.storage import hash_file, write_atomic

Rows = npt.NDArray[np.int64]


def spans_fit(offsets: Rows, sizes: Rows, total: int, width: int = 1) -> bool:
    """Whether spans of values lie inside a file.

    Args:
        offsets: First byte of each span.
        sizes: Number of values of each span.
        total: Bytes of the file.
        width: Bytes per value.
    """
    # Nothing is added: the sum of malicious values could overflow.
    return not bool((offsets > total).any() or (sizes > (total - offsets) // width).any())


def sidecar_rows(counts: Rows, width: int) -> Rows:
    """The sidecar of a file that holds only tokens.

    Args:
        counts: Number of tokens of each document.
        width: Bytes per token.
    """
    ends = np.cumsum(counts)
    return np.stack([(ends - counts) * width, counts], axis=1)


def write_sidecar(path: Path, rows: Rows) -> str:
    """Write a sidecar atomically and return its hash."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(rows, dtype="<i8"), allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return hash_file(path)
