"""Sidecars: one int64 .npy array a shard, with a row for each sample; what the columns are is the sample kind's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigtrain.storage import hash_file, write_atomic

Rows = npt.NDArray[np.int64]


def spans_fit(offsets: Rows, sizes: Rows, total: int, width: int = 1) -> bool:
    """Whether spans of so many values of a width lie inside a file of `total` bytes."""
    # Compared without adding: a hostile sum would wrap around.
    return not bool((offsets > total).any() or (sizes > (total - offsets) // width).any())


def sidecar_rows(counts: Rows, width: int) -> Rows:
    """The sidecar of a file that holds nothing but the tokens of documents of these lengths."""
    ends = np.cumsum(counts)
    return np.stack([(ends - counts) * width, counts], axis=1)


def write_sidecar(path: Path, rows: Rows) -> str:
    """Write a sidecar atomically and return its hash."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(rows, dtype="<i8"), allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return hash_file(path)
