"""Samples that stand alone: images with classes, images with captions, arrays; from shards to arrays of a batch."""

from __future__ import annotations

import os
from abc import abstractmethod
from functools import cached_property

import numpy as np

from bigtrain.config import CorruptionError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.formats.arrays import LABELS
from bigtrain.data.formats.images import decode_image
from bigtrain.data.formats.text import decode_caption, encode_document
from bigtrain.data.index import REINDEX, CaptionForm, ShardIndex
from bigtrain.data.kinds.tokens import Arrays, Reader, ShardReader, TokenReader
from bigtrain.data.order.sample_order import IntArray
from bigtrain.data.streaming.store import ShardStore, open_store
from bigtrain.data.tokenizers import Tokenizer


def open_reader(
    index: ShardIndex,
    context: int,
    document_mask: bool = False,
    open_shards: int = 16,
    streaming: StreamingConfig | None = None,
) -> Reader:
    """The reader for a shard directory's kind of data.

    Args:
        index: The directory's index.
        context: Tokens of a sequence or caption; unused for images and arrays.
        document_mask: Also yield `documents` and `positions`, of text.
        open_shards: Shards kept open at once.
        streaming: How shards are fetched that are not here.
    """
    store = open_store(index, streaming)
    if index.kind == "images":
        return ImageReader(index, open_shards, store)
    if index.kind == "captions":
        return CaptionReader(index, context, open_shards, store)
    if index.kind == "arrays":
        return ArrayReader(index, open_shards, store)
    return TokenReader(index, context, document_mask, open_shards, store)


class SampleReader(ShardReader[tuple[int, IntArray]]):
    """What the readers of samples have in common: a sample is read from its place in the tar."""

    @abstractmethod
    def blank(self, count: int) -> Arrays:
        """Valid content of weight zero."""

    @abstractmethod
    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """Write the sample of a sidecar's row, but not its weight, into a place of what `blank` has made."""

    def weigh(self, arrays: Arrays, rows: list[list[int]]) -> None:
        """Set the weights of samples, by their rows."""
        arrays["weights"][:] = 1

    def read(self, shards: IntArray, indices: IntArray) -> Arrays:
        """The samples number `indices[i]` of shard `shards[i]`, as `blank` names them."""
        arrays = self.blank(len(shards))
        rows = []
        for place, (shard, index) in enumerate(zip(shards.tolist(), indices.tolist(), strict=True)):
            descriptor, table = self._shards[shard]
            row = table[index].tolist()
            where = f"{self._index.directory / self._index.shards[shard].url}, sample {index}"
            self.fill(arrays, place, descriptor, row, where)
            rows.append(row)
        self.weigh(arrays, rows)
        return arrays

    def sample_ids(self, source: str, shards: IntArray, indices: IntArray) -> list[str]:
        """SOURCE/SHARD/SAMPLE:0."""
        stems = [self._index.shards[shard].stem for shard in shards.tolist()]
        return [f"{source}/{stem}/{index}:0" for stem, index in zip(stems, indices.tolist(), strict=True)]

    def _open(self, shard: int) -> tuple[int, IntArray]:
        found = self._store.open(shard)
        return os.open(found.path, os.O_RDONLY), found.rows

    def _close(self, opened: tuple[int, IntArray]) -> None:
        os.close(opened[0])


class ImageReader(SampleReader):
    """Images with their class."""

    def blank(self, count: int) -> Arrays:
        """images uint8 (n, height, width, channels), black; labels int64 (n,), weights float32 (n,)."""
        return {
            "images": _black(self._index, count),
            LABELS: np.zeros(count, np.int64),
            "weights": np.zeros(count, np.float32),
        }

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        offset, size, label = row
        arrays["images"][place] = _image(self._index, descriptor, offset, size, where)
        arrays[LABELS][place] = label


class CaptionReader(SampleReader):
    """Images with their caption, which is cut or padded to `context` tokens."""

    def __init__(self, index: ShardIndex, context: int, open_shards: int = 16, store: ShardStore | None = None) -> None:
        super().__init__(index, open_shards, store)
        self._context = context

    def blank(self, count: int) -> Arrays:
        """images uint8 (n, height, width, channels), tokens int64 (n, T), weights float32 (n, T).

        A caption is its tokens and the end of text, of weight one, then tokens 0 of weight zero; one that is longer
        than T loses its end.
        """
        return {
            "images": _black(self._index, count),
            "tokens": np.zeros((count, self._context), np.int64),
            "weights": np.zeros((count, self._context), np.float32),
        }

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        arrays["images"][place] = _image(self._index, descriptor, row[0], row[1], where)
        offset, size, count, form = row[2:]
        data = _bytes(descriptor, offset, size, where)
        if form == CaptionForm.TOKENS:
            ids = np.frombuffer(data, dtype=self._index.dtype).astype(np.int64)
        else:
            ids = encode_document(decode_caption(data, form == CaptionForm.GZIP, where), self._tokenizer)
        if len(ids) != count:
            raise CorruptionError(f"the caption has {len(ids)} tokens; indexed were {count}", where, REINDEX)
        arrays["tokens"][place, : len(ids)] = ids[: self._context]

    def weigh(self, arrays: Arrays, rows: list[list[int]]) -> None:
        """See `SampleReader`."""
        counts = np.asarray([row[4] for row in rows], dtype=np.int64).reshape(-1, 1)
        arrays["weights"][:] = np.arange(self._context) < counts

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._index.load_tokenizer()


class ArrayReader(SampleReader):
    """Arrays by their names, and a class where there is one."""

    def blank(self, count: int) -> Arrays:
        """Each array as it is stored, (n, ...), zeros; with classes labels int64 (n,); weights float32 (n,)."""
        arrays: Arrays = {
            info.name: np.zeros((count, *info.shape), np.dtype(info.dtype)) for info in self._index.arrays or ()
        }
        if self._index.classes is not None:
            arrays[LABELS] = np.zeros(count, np.int64)
        return arrays | {"weights": np.zeros(count, np.float32)}

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        infos = self._index.arrays or ()
        for info, offset in zip(infos, row, strict=False):
            values = arrays[info.name][place : place + 1].reshape(-1).view(np.uint8).data
            if os.preadv(descriptor, [values], offset) != info.bytes:
                raise _too_short(where)
        if self._index.classes is not None:
            arrays[LABELS][place] = row[-1]


def _black(index: ShardIndex, count: int) -> np.ndarray:
    assert index.image is not None
    return np.zeros((count, index.image.height, index.image.width, index.image.channels), np.uint8)


def _image(index: ShardIndex, descriptor: int, offset: int, size: int, where: str) -> np.ndarray:
    assert index.image is not None
    return decode_image(_bytes(descriptor, offset, size, where), index.image, where)


def _bytes(descriptor: int, offset: int, size: int, where: str) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise _too_short(where)
    return data


def _too_short(where: str) -> CorruptionError:
    return CorruptionError("the shard ends before its index says", where=where)
