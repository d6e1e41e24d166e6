"""Arrays as members of a tar: `KEY.npy` and `KEY.NAME.npy`, each name of one type and shape in all samples."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.npy import MAX_DIMENSIONS, NpyLayout

ARRAY_TYPES = ("<f2", "<f4", "<f8", "|u1", "|i1", "<i2", "<i4", "<i8")
"""Numbers that PyTorch has tensors of."""
ONLY_NAME = "array"
"""What a batch calls the array of `KEY.npy`."""
LABELS = "labels"
"""What a batch calls the classes of `KEY.cls`."""
RESERVED = (LABELS, "weights", "keys", "sources")
"""Names that batches give to something else."""
MAX_ARRAY_BYTES = 1 << 28
MAX_ARRAYS = 16
"""Of one sample."""
NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")

_SUFFIX = re.compile(r"(?:(.*)\.)?npy")


@dataclass(frozen=True)
class ArrayInfo:
    """The type and shape that the arrays of one name have."""

    name: str
    dtype: str
    """As NumPy writes it: "<f4"."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of one."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.name} {np.dtype(self.dtype).name} {self.shape}"

    def as_json(self) -> dict[str, object]:
        """Its entry in index.json."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: dict[str, object]) -> ArrayInfo:
        """From its entry in an index.json, which may come from anywhere.

        Raises:
            ValueError, KeyError, TypeError: It is not one.
        """
        name, dtype, shape = value["name"], value["dtype"], value["shape"]
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED or dtype not in ARRAY_TYPES:
            raise ValueError(f"an array is called {name!r} and of type {dtype!r}")
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
    """The name that a member's suffix gives its array; None for another kind of member.

    Raises:
        UserError: A name that batches cannot have.
    """
    match = _SUFFIX.fullmatch(suffix)
    if match is None:
        return None
    name = match.group(1) or ONLY_NAME
    if not NAME.fullmatch(name) or name in RESERVED:
        raise UserError(
            f"an array cannot be called {name[:80]!r}",
            where=where,
            fix=f"name it as in KEY.x.npy: letters, digits and '_', and none of {', '.join(RESERVED)}",
        )
    return name


def array_info(name: str, layout: NpyLayout, stored_bytes: int, where: str) -> ArrayInfo:
    """The array of a member that has this header and so many bytes in all.

    Raises:
        UserError: Of a type that is not read, empty, too large, or not of the size that its header says.
    """
    if layout.dtype not in ARRAY_TYPES:
        raise UserError(
            f"the array {name!r} is of type {layout.dtype}, which is not read",
            where=where,
            fix=f"store one of {', '.join(ARRAY_TYPES)}; objects are pickles, and never read",
        )
    info = ArrayInfo(name, layout.dtype, layout.shape)
    if layout.fortran and len(layout.shape) > 1:
        raise UserError(
            f"the array {name!r} is stored column by column", where=where, fix="store np.ascontiguousarray of it"
        )
    if not layout.values or info.bytes > MAX_ARRAY_BYTES:
        raise UserError(
            f"the array {name!r} of shape {layout.shape} has {info.bytes} bytes; 1 to {MAX_ARRAY_BYTES} are read",
            where=where,
        )
    if layout.begin + info.bytes != stored_bytes:
        raise UserError(f"the header of the array {name!r} does not fit its bytes", where=where)
    return info
