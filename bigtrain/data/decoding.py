"""Decodes members of tars into arrays with WebDataset, using one registered decoder per suffix.

WebDataset's default `.decode()` unpickles some suffixes, so it is never used: its `Decoder` runs only the registered
decoders. A plugin can add a decoder for its own format:

    @DECODERS.register
    class Point(MemberDecoder):
        name = "point"                                  # of members KEY.point and KEY.NAME.point

        def decode(self, data: bytes) -> Any:
            return {"x": float(data[:8]), "y": float(data[8:])}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

import numpy as np

from bigtrain.config import UserError
from bigtrain.config.registry import Registry
from bigtrain.data.formats.arrays import ARRAY_TYPES, MAX_ARRAYS, NAME, RESERVED
from bigtrain.models.batches import Arrays


class MemberDecoder(ABC):
    """Decodes the members with one suffix."""

    name: ClassVar[str]
    """The suffix, such as "mp"."""

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """The value of a member: an array, a number, or lists and mappings of them. It may raise any exception."""


DECODERS: Registry[MemberDecoder] = Registry(
    "member decoder",
    MemberDecoder,  # type: ignore[type-abstract]  # what inherits it is not
    package="bigtrain.data.decoders",
    tag=None,
    where="--plugin",
)


def decoder_of(suffix: str) -> str | None:
    """The name of the decoder for a member's suffix; None if there is none."""
    last = suffix.rpartition(".")[2]
    return last if last in DECODERS else None


def decode(suffix: str, data: bytes, where: str) -> Arrays:
    """The arrays of a member by name.

    In a mapping, the key is the name. Other values are named after the suffix, and items of a list get their index too.

    Args:
        where: Location of the member, for error messages.

    Raises:
        UserError: The decoder fails, or it returns something other than numbers, too many arrays or invalid names.
    """
    name = decoder_of(suffix)
    assert name is not None
    try:
        value = _decoder(name)(suffix, data)
    except Exception as error:  # noqa: BLE001 - a decoder of the user's, on bytes from anywhere
        raise UserError(f"the member .{suffix} cannot be decoded: {type(error).__name__}: {error}", where) from None
    found: Arrays = {}
    for key, one in _flat(value, suffix.replace(".", "_")):
        array = np.asarray(one)
        if array.dtype.newbyteorder("<").str not in ARRAY_TYPES or key in found or len(found) == MAX_ARRAYS:
            raise UserError(
                f"the member .{suffix} holds {key!r} of type {array.dtype}, which is not supported", where,
                f"Store at most {MAX_ARRAYS} arrays of {', '.join(ARRAY_TYPES)} in a sample, each under its own name.",
            )  # fmt: skip
        if not NAME.fullmatch(key) or key in RESERVED:
            raise UserError(f"an array cannot have the name {key[:80]!r}", where)
        found[key] = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return found


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _flat(one, str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(one, (np.ndarray, dict)) for one in value):
        for number, one in enumerate(value):
            yield from _flat(one, f"{name}_{number}")
    else:
        yield name, value


@cache
def _decoder(name: str) -> Callable[[str, bytes], Any]:
    # Imported only when a tar needs it, because it imports torch.
    from webdataset.autodecode import Decoder, gzfilter, handle_extension

    handler = handle_extension(name, DECODERS[name]().decode)
    return Decoder([handler], pre=[gzfilter], post=[]).decode1
