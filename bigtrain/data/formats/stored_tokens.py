"""Reads tokens that are stored as one-dimensional arrays in .npy members of a tar."""

from __future__ import annotations

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.npy import HEADER_BYTES, npy_layout
from bigtrain.data.formats.tar import TarSample, read_at

TOKEN_TYPES = ("<u2", "<u4", "<i4", "<i8")
MAX_ID = 2**31 - 1


class StoredTokens:
    """Checks the lists of tokens in .npy members, which must all have one type, and finds the largest id."""

    def __init__(self) -> None:
        self.dtype: str | None = None
        self.largest = -1
        self._next: tuple[str, int] = ("", -1)

    def place(self, sample: TarSample) -> tuple[int, int, int]:
        """Byte offset in the tar, number, and bytes per token of a sample's tokens.

        The sample is only counted if `keep` is called afterwards.

        Raises:
            UserError: The member is no list of tokens, or has another type than earlier ones.
        """
        member, where = sample.one("npy"), sample.where
        layout = npy_layout(read_at(sample.path, member.offset, min(member.size, HEADER_BYTES)), where)
        if layout.dtype not in TOKEN_TYPES or len(layout.shape) != 1:
            raise UserError(
                f"the array is not a list of tokens (type {layout.dtype}, {len(layout.shape)} dimensions)",
                where=where,
                fix=f"Store an array of one dimension of type {', '.join(TOKEN_TYPES)}.",
            )
        width, offset, count = np.dtype(layout.dtype).itemsize, member.offset + layout.begin, layout.shape[0]
        if layout.begin + count * width != member.size or offset % width:
            raise UserError("the array's header does not fit its bytes", where=where)
        if self.dtype not in (None, layout.dtype):
            raise UserError(
                f"the tokens are stored as {layout.dtype}, but those of earlier samples as {self.dtype}", where=where
            )
        tokens = np.frombuffer(read_at(sample.path, offset, count * width), layout.dtype)
        self._next = layout.dtype, _largest_id(tokens, where)
        return offset, count, width

    def keep(self) -> None:
        """Count the tokens of the last call of `place`."""
        self.dtype, self.largest = self._next[0], max(self.largest, self._next[1])


def needs_tokenizer(sample: TarSample) -> UserError:
    """The error for text in a tar without a named tokenizer."""
    return UserError("text inside tars needs a tokenizer", sample.where, "Give one with --tokenizer.")


def _largest_id(tokens: np.ndarray, where: str) -> int:
    """The largest of some token ids; -1 if there are none."""
    if not len(tokens):
        return -1
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > MAX_ID:
        raise UserError(
            f"{low if low < 0 else high} is not a token",
            where=where,
            fix="Give an array that holds no tokens a name: KEY.x.npy.",
        )
    return high
