"""Text as members of tars (`KEY.txt`, `KEY.txt.gz`): reads a member, and tokenises a shard."""

from __future__ import annotations

import codecs
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.formats.tar import read_at

if TYPE_CHECKING:
    from bigtrain.data.tokenizers import Tokenizer, Tokens

TEXT_MEMBERS = {"txt": False, "text": False, "txt.gz": True, "text.gz": True}
"""Suffixes of text members, and whether they are compressed with gzip."""
MAX_TEXT_BYTES = 1 << 28
MAX_CAPTION_BYTES = 1 << 16
"""Maximum bytes of a caption, both stored and decompressed."""


def read_text(path: Path, offset: int, size: int, compressed: bool, where: str) -> str:
    """The text of a member, without a byte-order mark.

    Raises:
        UserError: The text is larger than MAX_TEXT_BYTES (stored or decompressed), binary, or not UTF-8.
    """
    if size > MAX_TEXT_BYTES:
        raise UserError(f"the text has more than {MAX_TEXT_BYTES} bytes", where=where)
    return _decoded(read_at(path, offset, size), compressed, MAX_TEXT_BYTES, where)


def decode_caption(data: bytes, compressed: bool, where: str) -> str:
    """The text of a caption, without white space at its ends.

    Raises:
        UserError: The caption is empty, larger than MAX_CAPTION_BYTES, binary, or not UTF-8.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise UserError(f"the caption has more than {MAX_CAPTION_BYTES} bytes", where=where)
    text = _decoded(data, compressed, MAX_CAPTION_BYTES, where).strip()
    if not text:
        raise UserError("the caption is empty", where, "Write one, or skip some such samples: --skip-bad NUMBER.")
    return text


def _decoded(data: bytes, compressed: bool, limit: int, where: str) -> str:
    if compressed:
        data = gunzip(data, limit, where)
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise UserError("the text is binary", where=where, fix="Give UTF-8 text.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the text is not UTF-8: {error.reason}", where=f"{where}, byte {error.start}") from None


def gunzip(data: bytes, limit: int, where: str) -> bytes:
    """Decompress gzip data of one or several parts.

    Raises:
        UserError: The data is not gzip, is truncated, or decompresses to more than `limit` bytes.
    """
    whole = bytearray()
    while data:
        stream = zlib.decompressobj(wbits=31)
        try:
            whole += stream.decompress(data, limit + 1 - len(whole))
        except zlib.error as error:
            raise UserError(f"the gzip data is damaged: {error}", where=where) from None
        if len(whole) > limit:
            raise UserError(f"the data takes more than {limit} bytes when decompressed", where=where)
        if not stream.eof:
            raise UserError("the gzip data is cut short", where=where)
        data = stream.unused_data.lstrip(b"\0")
    return bytes(whole)


def encode_document(text: str, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a document, with a begin-of-text token if the tokenizer adds one, and the end-of-text token."""
    begin = [] if tokenizer.bos is None else [np.asarray([tokenizer.bos], dtype=np.int64)]
    return np.concatenate([*begin, *tokenizer.encode_stream([text]), np.asarray([tokenizer.eot], dtype=np.int64)])


def tokenise_shard(path: Path, rows: np.ndarray, tokenizer: Tokenizer, file: BinaryIO) -> None:
    """Write the tokens of all documents of a shard of text, in the tokenizer's dtype.

    Args:
        rows: The shard's sidecar.
        file: The file to write to.

    Raises:
        CorruptionError: The number of tokens of a document differs from the index.
    """
    for number, (offset, size, tokens, compressed) in enumerate(rows.tolist()):
        where = f"{path}, document {number}"
        ids = encode_document(read_text(path, offset, size, bool(compressed), where), tokenizer)
        if len(ids) != tokens:
            raise CorruptionError(
                f"the document has {len(ids)} tokens, but the index says {tokens}",
                where,
                "Index the shards again with this version of the tokenizers library. They then count as different "
                "data.",
            )
        file.write(ids.astype(tokenizer.dtype).tobytes())
