"""Text that lies as members in tars (`KEY.txt`, `KEY.txt.gz`): reading a member, tokenising a shard."""

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
"""Suffixes of members that are text, and whether they are gzip."""
MAX_TEXT_BYTES = 1 << 28
MAX_CAPTION_BYTES = 1 << 16
"""Of a caption, as it is stored and decompressed."""


def read_text(path: Path, offset: int, size: int, compressed: bool, where: str) -> str:
    """The text of a member, without a byte-order mark.

    Raises:
        UserError: Larger than MAX_TEXT_BYTES when decompressed, binary, or not UTF-8.
    """
    if size > MAX_TEXT_BYTES:
        raise UserError(f"the text has more than {MAX_TEXT_BYTES} bytes", where=where)
    return _decoded(read_at(path, offset, size), compressed, MAX_TEXT_BYTES, where)


def decode_caption(data: bytes, compressed: bool, where: str) -> str:
    """A caption without white space around it.

    Raises:
        UserError: Empty, larger than MAX_CAPTION_BYTES, binary, or not UTF-8.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise UserError(f"the caption has more than {MAX_CAPTION_BYTES} bytes", where=where)
    text = _decoded(data, compressed, MAX_CAPTION_BYTES, where).strip()
    if not text:
        raise UserError("the caption is empty", where=where)
    return text


def _decoded(data: bytes, compressed: bool, limit: int, where: str) -> str:
    if compressed:
        data = gunzip(data, limit, where)
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise UserError("the text is binary", where=where, fix="give UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the text is not UTF-8: {error.reason}", where=f"{where}, byte {error.start}") from None


def gunzip(data: bytes, limit: int, where: str) -> bytes:
    """Decompress gzip of one or several parts.

    Raises:
        UserError: Not gzip, cut short, or larger than `limit` bytes.
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
    """The tokens of a document and the end of text, after a begin of text where the tokenizer has one."""
    begin = [] if tokenizer.bos is None else [np.asarray([tokenizer.bos], dtype=np.int64)]
    return np.concatenate([*begin, *tokenizer.encode_stream([text]), np.asarray([tokenizer.eot], dtype=np.int64)])


def tokenise_shard(path: Path, rows: np.ndarray, tokenizer: Tokenizer, file: BinaryIO) -> None:
    """Write the tokens of a shard of text, document after document, as the tokenizer's type.

    Args:
        rows: Its sidecar.

    Raises:
        CorruptionError: A document has another number of tokens than indexed.
    """
    for number, (offset, size, tokens, compressed) in enumerate(rows.tolist()):
        where = f"{path}, document {number}"
        ids = encode_document(read_text(path, offset, size, bool(compressed), where), tokenizer)
        if len(ids) != tokens:
            raise CorruptionError(
                f"the document has {len(ids)} tokens; indexed were {tokens}",
                where,
                "index the shards again with this version of the tokenizers library: they become other data",
            )
        file.write(ids.astype(tokenizer.dtype).tobytes())
