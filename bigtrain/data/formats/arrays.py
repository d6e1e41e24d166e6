"""Arrays as members of a tar: `KEY.npy` and `KEY.NAME.npy`. Each name has one type and shape in all samples."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.npy import MAX_DIMENSIONS, NpyLayout

ARRAY_TYPES = ("<f2", "<f4", "<f8", "|u1", "|i1", "<i2", "<i4", "<i8")
"""Supported types: those that PyTorch has tensors of."""
ONLY_NAME = "array"
"""Name of the array of `KEY.npy` in a batch."""
LABELS = "labels"
"""Name of the classes of `KEY.cls` in a batch."""
RESERVED = (LABELS, "weights", "keys", "sources")
"""Names that batches use for other arrays."""
MAX_ARRAY_BYTES = 1 << 28
MAX_ARRAYS = 16
"""Maximum number of arrays in a sample."""
NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")

_SUFFIX = re.compile(r"(?:(.*)\.)?npy")


@dataclass(frozen=True)
class ArrayInfo:
    """Type and shape of the arrays with one name."""

    name: str
    dtype: str
    """Dtype in NumPy's notation: "<f4"."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of one array in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.name} {np.dtype(self.dtype).name} {self.shape}"

    def as_json(self) -> dict[str, object]:
        """The entry in index.json."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: dict[str, object]) -> ArrayInfo:
        """Read an entry of an untrusted index.json.

        Raises:
            ValueError, KeyError, TypeError: The value is no such entry.
        """
        name, dtype, shape = value["name"], value["dtype"], value["shape"]
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED or dtype not in ARRAY_TYPES:
            raise ValueError(f"an array has the name {name!r} and the type {dtype!r}")
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMENSIONS
            or not all(type(size) is int and 0 < size < 1 << 40 for size in shape)
        ):
            raise ValueError(f"the array {name!r} has the shape {shape!r}")
        found = cls(name, str(dtype), tuple(shape))
        if found.bytes > MAX_ARRAY_BYTES:
            raise ValueError(f"the array {name!r} has {found.bytes} bytes")
        return found


def array_name(suffix: str, where: str) -> str | None:
    """The name of the array in a member, from the member's suffix; None if the member is no array.

    Raises:
        UserError: Arrays in batches cannot have this name.
    """
    match = _SUFFIX.fullmatch(suffix)
    if match is None:
        return None
    name = match.group(1) or ONLY_NAME
    if not NAME.fullmatch(name) or name in RESERVED:
        raise UserError(
            f"an array cannot have the name {name[:80]!r}",
            where=where,
            fix=f"Name it as in KEY.x.npy: lower-case letters, digits and '_', and none of {', '.join(RESERVED)}.",
        )
    return name


def array_info(name: str, layout: NpyLayout, stored_bytes: int, where: str) -> ArrayInfo:
    """Name, type and shape of the array in a member.

    Args:
        layout: The parsed header of the member.
        stored_bytes: Size of the member.
        where: Location of the member, for error messages.

    Raises:
        UserError: The array has an unsupported type, is empty or too large, or has another size than its header says.
    """
    if layout.dtype not in ARRAY_TYPES:
        raise UserError(
            f"the array {name!r} is of type {layout.dtype}, which is not supported",
            where=where,
            fix=f"Store one of {', '.join(ARRAY_TYPES)}. Arrays of objects are pickles, which are never read.",
        )
    info = ArrayInfo(name, layout.dtype, layout.shape)
    if layout.fortran and len(layout.shape) > 1:
        raise UserError(
            f"the array {name!r} is stored in column-major (Fortran) order",
            where=where,
            fix="Store np.ascontiguousarray(array).",
        )
    if not layout.values or info.bytes > MAX_ARRAY_BYTES:
        raise UserError(
            f"the array {name!r} of shape {layout.shape} has {info.bytes} bytes; 1 to {MAX_ARRAY_BYTES} are read",
            where=where,
        )
    if layout.begin + info.bytes != stored_bytes:
        raise UserError(f"the header of the array {name!r} does not fit its bytes", where=where)
    return info
