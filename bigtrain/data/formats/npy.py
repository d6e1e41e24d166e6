"""Parses the header of a .npy array without evaluating it, so that arrays of objects (pickles) can be refused."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import numpy as np

from bigtrain.config import UserError

HEADER_BYTES = 4096
"""Maximum bytes of the header, before the values."""
MAX_DIMENSIONS = 8

_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\s*\{\s*'descr':\s*'([<>|=]?[a-zA-Z][0-9]*)',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*\(([0-9, ]*)\),?\s*\}\s*"
)


@dataclass(frozen=True)
class NpyLayout:
    """The content of an array's header."""

    dtype: str
    """Dtype in NumPy's notation ("<f4"); "unknown" if it is no simple type."""
    shape: tuple[int, ...]
    fortran: bool
    """Whether the values are stored in Fortran order (first axis contiguous)."""
    begin: int
    """Byte at which the values begin."""

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def npy_layout(head: bytes, where: str) -> NpyLayout:
    """The layout of an array, from its first bytes.

    Args:
        head: The first HEADER_BYTES of the array, or all of its bytes.
        where: Location of the array, for error messages.

    Raises:
        UserError: The bytes are not those of a .npy array.
    """
    version = head[6] if len(head) > 12 else 0
    if not head.startswith(_MAGIC) or version not in (1, 2, 3):
        raise UserError("the member is not a .npy array", where=where)
    start = 10 if version == 1 else 12
    begin = start + int.from_bytes(head[8:start], "little")
    match = _HEADER.fullmatch(head[start:begin])
    if match is None or begin > len(head):
        return NpyLayout("unknown", (), False, begin)
    sizes = [part.strip() for part in match.group(3).split(b",") if part.strip()]
    if len(sizes) > MAX_DIMENSIONS or any(b" " in part or len(part) > 18 for part in sizes):
        return NpyLayout("unknown", (), False, begin)
    return NpyLayout(match.group(1).decode(), tuple(map(int, sizes)), match.group(2) == b"True", begin)


def npy_bytes(values: np.ndarray) -> bytes:
    """The bytes of a .npy file with an array."""
    buffer = io.BytesIO()
    # np.ascontiguousarray is not used, because it turns a scalar into a one-dimensional array.
    np.lib.format.write_array(buffer, np.asarray(values, order="C"), allow_pickle=False)
    return buffer.getvalue()
