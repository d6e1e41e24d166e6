"""The header of a .npy array, read without evaluating it: arrays of objects (pickles) are seen and refused."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import numpy as np

from bigtrain.config import UserError

HEADER_BYTES = 4096
"""Where an array must begin at the latest."""
MAX_DIMENSIONS = 8

_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\s*\{\s*'descr':\s*'([<>|=]?[a-zA-Z][0-9]*)',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*\(([0-9, ]*)\),?\s*\}\s*"
)


@dataclass(frozen=True)
class NpyLayout:
    """What an array's header says."""

    dtype: str
    """As NumPy writes it ("<f4"); "unknown" where it is no simple type."""
    shape: tuple[int, ...]
    fortran: bool
    """Whether the first axis runs fastest."""
    begin: int
    """Byte at which the values begin."""

    @property
    def values(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


def npy_layout(head: bytes, where: str) -> NpyLayout:
    """The layout of the array whose first bytes these are.

    Args:
        head: HEADER_BYTES of it, or all that there are.

    Raises:
        UserError: Not a .npy array.
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
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    # Not ascontiguousarray, which makes one number an array of one axis.
    np.lib.format.write_array(buffer, np.asarray(values, order="C"), allow_pickle=False)
    return buffer.getvalue()
