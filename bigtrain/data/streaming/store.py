"""Provides shards to the reader, from their directory or from a cache that threads fill ahead of the reader."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from bigtrain.config import CorruptionError, UserError
from bigtrain.config.urls import is_url
from bigtrain.data.config import StreamingConfig
from bigtrain.data.encoding.files import COMPANIONS, MAX_COMPANION_BYTES
from bigtrain.data.encoding.files import FILE_NAME as TOKENIZER_NAME
from bigtrain.data.formats.text import tokenise_shard
from bigtrain.data.index import INDEX_NAME, MAX_INDEX_BYTES, REINDEX, ShardIndex, load_index, parse_index
from bigtrain.data.sidecar import Rows, sidecar_rows
from bigtrain.data.streaming.cache import Cache, HeldShard, NoRoom
from bigtrain.data.streaming.remote import exists
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.storage import write_atomic
from bigtrain.storage.objects import Cancelled, Patience, Place, RemoteError, cache_home, fetch
from bigtrain.storage.scheme import open_url

FETCHERS = 8
MAX_TOKENIZER_BYTES = 1 << 28


@dataclass(frozen=True)
class StoredShard:
    """A shard that can be read now."""

    path: Path
    """Path of the tar; for text, of a file with only its tokens."""
    rows: Rows
    """The shard's sidecar; for text, the sidecar of the file of tokens."""


class ShardStore(Protocol):
    """Provides shards to a reader."""

    def expect(self, shards: Iterable[int]) -> None:
        """Prepare these shards in this order, and release all others."""
        ...

    def open(self, shard: int) -> StoredShard:
        """A shard; waits if it is not ready yet.

        Raises:
            UserError: The shard is missing.
            CorruptionError: The shard is not the one that was indexed.
            RemoteError: The shard could not be fetched.
        """
        ...

    def interrupt(self) -> None:
        """End the waiting in `open` with Cancelled. May be called from any thread."""
        ...

    def close(self) -> None:
        """End all work, and release all shards."""
        ...


def open_store(index: ShardIndex, streaming: StreamingConfig | None = None) -> ShardStore:
    """The store for the shards of an index."""
    if not index.streams:
        return LocalStore(index)
    return CachedStore(index, streaming or StreamingConfig())


class LocalStore:
    """Shards that lie beside their index."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    def expect(self, shards: Iterable[int]) -> None:
        """See `ShardStore`. Local shards need no preparation."""

    def open(self, shard: int) -> StoredShard:
        """See `ShardStore`."""
        path = self._index.directory / self._index.shards[shard].url
        expect_size(path, self._index.shards[shard].filesize)
        return StoredShard(path, self._index.rows(shard))

    def interrupt(self) -> None:
        """See `ShardStore`. `open` never waits."""

    def close(self) -> None:
        """See `ShardStore`."""


class _Wanted:
    """A shard that is in use or will be soon."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.result: Future[tuple[StoredShard, HeldShard] | None] | None = None


class CachedStore:
    """Shards that threads fetch into a cache, and text that they tokenise into it."""

    def __init__(self, index: ShardIndex, streaming: StreamingConfig) -> None:
        self._index = index
        self._patience = patience(streaming)
        self._check = streaming.verify != "never"
        self._cache = Cache(cache_root(streaming), streaming.cache)
        self._directory = self._cache.directory(index.place, index.fingerprint)
        self._place: Place | None = None
        if index.shards_url is not None:
            self._place = open_url(index.shards_url, self._patience)
        self._tokenizer = index.load_tokenizer() if index.text else None
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="bigtrain-fetch")
        self._wanted: dict[int, _Wanted] = {}
        self._lock = threading.Lock()

    def expect(self, shards: Iterable[int]) -> None:
        """See `ShardStore`."""
        with self._lock:
            kept = dict.fromkeys(shards)
            for shard in [shard for shard in self._wanted if shard not in kept]:
                _let_go(self._wanted.pop(shard))
            for shard in kept:
                wanted = self._wanted.setdefault(shard, _Wanted())
                # A result of None means that the cache had no space for the shard the last time.
                if wanted.result is None or (wanted.result.done() and _value(wanted.result) is None):
                    wanted.result = self._pool.submit(self._get, shard, wanted.cancelled, False)

    def open(self, shard: int) -> StoredShard:
        """See `ShardStore`."""
        with self._lock:
            wanted = self._wanted.setdefault(shard, _Wanted())
            result = wanted.result
        found = None if result is None else result.result()
        if found is not None and not found[0].path.exists():
            # Another process has emptied the cache since the shard was fetched.
            found[1].release()
            found = None
        if found is None:
            with self._lock:
                result = wanted.result = self._pool.submit(self._get, shard, wanted.cancelled, True)
            found = result.result()
        if found is None:
            raise Cancelled
        return found[0]

    def interrupt(self) -> None:
        """See `ShardStore`."""
        with self._lock:
            for wanted in self._wanted.values():
                wanted.cancelled.set()

    def close(self) -> None:
        """See `ShardStore`."""
        with self._lock:
            while self._wanted:
                _let_go(self._wanted.popitem()[1])
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _get(self, shard: int, cancelled: threading.Event, urgent: bool) -> tuple[StoredShard, HeldShard] | None:
        """The shard with its lease; None if it was cancelled, or not urgent and the cache has no space."""
        entry = self._index.shards[shard]
        get = partial(self._cache.get, urgent=urgent, check=self._check, cancelled=cancelled)
        try:
            rows = self._rows(shard, get, cancelled)
            if self._index.text:
                return self._tokens(shard, rows, get, cancelled)
            lease = get(
                self._directory / entry.url,
                size=entry.filesize,
                hash=entry.hash,
                fill=partial(self._fetch, entry.url, entry.filesize, cancelled),
            )
        except (NoRoom, Cancelled):
            return None
        except CorruptionError as error:
            where = error.where if self._place is None else f"{self._place.url}/{entry.url}"
            raise CorruptionError(error.what, where, error.fix) from None
        return StoredShard(lease.path, rows), lease

    def _fetch(self, name: str, size: int | None, cancelled: threading.Event, file: BinaryIO) -> None:
        assert self._place is not None
        limit = MAX_INDEX_BYTES if size is None else size
        fetch(self._place, name, file, size=size, limit=limit, patience=self._patience, cancelled=cancelled)

    def _rows(self, shard: int, get: Any, cancelled: threading.Event) -> Rows:
        """The shard's sidecar, from beside the index or from the server."""
        entry = self._index.shards[shard]
        if self._index.origin is None:
            return self._index.rows(shard)
        while True:
            lease = get(
                self._directory / entry.index,
                size=self._index.sidecar_bytes(shard),
                hash=entry.index_hash,
                fill=partial(self._fetch, entry.index, None, cancelled),
            )
            try:
                return self._index.rows(shard, lease.path)
            except UserError:
                if lease.path.exists():
                    raise
                # Another process has emptied the cache between the two calls, so try again.
            finally:
                lease.release()

    def _tokens(self, shard: int, rows: Rows, get: Any, cancelled: threading.Event) -> tuple[StoredShard, HeldShard]:
        """The tokens of a shard of text, from the cache or tokenised now."""
        entry, index = self._index.shards[shard], self._index
        assert self._tokenizer is not None
        assert index.dtype is not None

        def make(file: BinaryIO) -> None:
            file.truncate(0)
            file.seek(0)
            tar = index.directory / entry.url
            lease: HeldShard | None = None
            if self._place is not None:
                tar = self._directory / entry.url
                fill = partial(self._fetch, entry.url, entry.filesize, cancelled)
                lease = get(tar, size=entry.filesize, hash=entry.hash, fill=fill)
            try:
                expect_size(tar, entry.filesize)
                assert self._tokenizer is not None
                tokenise_shard(tar, rows, self._tokenizer, file)
            finally:
                if lease is not None:
                    lease.release()

        width = np.dtype(index.dtype).itemsize
        tokens = self._directory / f"{entry.stem}.tokens"
        lease = get(tokens, size=entry.tokens * width, hash=entry.tokens_hash, fill=make)
        return StoredShard(tokens, sidecar_rows(rows[:, 2], width)), lease


def _value(
    result: Future[tuple[StoredShard, HeldShard] | None],
) -> tuple[StoredShard, HeldShard] | BaseException | None:
    return result.exception() or result.result()


def _let_go(wanted: _Wanted) -> None:
    wanted.cancelled.set()

    def release(result: Future[tuple[StoredShard, HeldShard] | None]) -> None:
        if not result.cancelled() and result.exception() is None and (found := result.result()) is not None:
            found[1].release()

    if wanted.result is not None and not wanted.result.cancel():
        wanted.result.add_done_callback(release)


def cache_root(streaming: StreamingConfig) -> Path:
    """The directory of the cache that a config names."""
    if streaming.cache_dir is not None:
        return Path(streaming.cache_dir)
    return cache_home()


def patience(streaming: StreamingConfig) -> Patience:
    """Timeout and number of retries for a failing server during training."""
    return Patience(streaming.timeout, streaming.retries)


def open_index(
    place: str | Path, streaming: StreamingConfig | None = None, pinned: Collection[str] | None = None
) -> ShardIndex:
    """The index of a shard directory, given by its path or URL.

    A remote index.json is fetched once into the cache, under its fingerprint.

    Args:
        pinned: Fingerprints, one of which a remote index must have. A cached index with such a fingerprint is used
            without a request to the server.

    Raises:
        UserError: See `load_index`; or the URL has a scheme that is not allowed, or the remote data has another
            fingerprint.
        RemoteError: The server cannot be read.
    """
    if not is_url(str(place)):
        return load_index(place)
    streaming = streaming or StreamingConfig()
    server = open_url(str(place), patience(streaming))
    cache = Cache(cache_root(streaming), streaming.cache)
    for fingerprint in pinned or ():
        directory = cache.directory(server.url, fingerprint)
        if (directory / INDEX_NAME).is_file():
            return _come_from(server.url, load_index(directory))
    data = read_small(server, INDEX_NAME, MAX_INDEX_BYTES, patience(streaming))
    index = parse_index(data, cache.root, f"{server.url}/{INDEX_NAME}")
    if index.base_url is not None:
        raise UserError(
            "the index refers to shards at another location, which only an index on this machine may do",
            f"{server.url}/{INDEX_NAME}",
            "Download the index and name its directory.",
        )
    if pinned is not None and index.fingerprint not in pinned:
        raise UserError("the data at this URL has changed since the run began", server.url, "Restore it.")
    directory = cache.directory(server.url, index.fingerprint)
    if index.tokenizer is not None and index.tokenizer.kind == "tokenizers":
        tokenizer = directory / TOKENIZER_NAME
        if not tokenizer.is_file():
            write_atomic(tokenizer, read_small(server, TOKENIZER_NAME, MAX_TOKENIZER_BYTES, patience(streaming)))
            for name in COMPANIONS:
                with contextlib.suppress(RemoteError):
                    companion = read_small(server, name, MAX_COMPANION_BYTES, patience(streaming))
                    write_atomic(directory / name, companion)
        try:
            Tokenizer.load(directory, index.tokenizer)
        except UserError:
            tokenizer.unlink(missing_ok=True)
            raise
    write_atomic(directory / INDEX_NAME, data)
    return _come_from(server.url, index.model_copy(update={"directory": directory}))


def _come_from(url: str, index: ShardIndex) -> ShardIndex:
    return index.model_copy(update={"origin": url})


def read_small(place: Place, name: str, limit: int, patience: Patience) -> bytes:
    """Read a full remote file.

    Raises:
        RemoteError: The file does not exist, or is larger than `limit` bytes.
    """
    with tempfile.TemporaryFile() as file:
        fetch(place, name, file, size=None, limit=limit, patience=patience)
        file.seek(0)
        return file.read()


def check_remote(held: Sequence[tuple[ShardIndex, int]], streaming: StreamingConfig) -> None:
    """Check streamed data before a run: the first shards exist, and the cache is large enough for all shards in use.

    Args:
        held: The sources, and how many shards of each source a rank uses at once; see `shards_at_once`.

    Raises:
        UserError: The cache is too small.
        RemoteError: A shard does not exist.
    """
    streamed = [(index, shards) for index, shards in held if index.streams]
    needed = 0
    for index, shards in streamed:
        needed += sum(
            sorted((index.stored_bytes(number) for number in range(len(index.shards))), reverse=True)[:shards]
        )
    if needed > streaming.cache:
        count = sum(shards for _, shards in streamed)
        raise UserError(
            f"streaming.cache is {streaming.cache} bytes, and the {count} shards in use at once may take {needed}",
            ", ".join(index.place for index, _ in streamed),
            f"Set streaming.cache to {needed} or more, or lower data.shuffle_window.",
        )
    hurried = Patience(streaming.timeout, min(2, streaming.retries))
    for index, _ in streamed:
        if index.shards_url is not None:
            exists(open_url(index.shards_url, hurried), index.shards[0].url, index.shards[0].filesize, hurried)


def shards_at_once(counts: Sequence[int], window: int, batch_sequences: int) -> int:
    """Maximum number of shards in use at once: those in the windows of a batch, and in the window fetched ahead.

    Args:
        counts: Number of sequences in each shard.
        window: Shards per window.
        batch_sequences: Sequences per global batch.
    """
    sizes = np.sort(np.asarray([count for count in counts if count], dtype=np.int64))
    if not len(sizes):
        return 0
    # In the worst case, a batch begins at the end of a window and then covers the smallest shards.
    beyond = int(np.searchsorted(np.cumsum(sizes), batch_sequences)) + 1
    windows = 2 + -(-beyond // window)
    return min(len(sizes), windows * window)


def expect_size(path: os.PathLike[str], size: int) -> None:
    """Refuse a shard whose size differs from the index.

    Raises:
        UserError: The shard is missing.
        CorruptionError: The shard has another size.
    """
    # Reading a memory-mapped file that has become shorter kills the process with SIGBUS, so the size is checked first.
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        raise UserError("the shard is missing", where=str(path), fix="Restore it.") from None
    if found != size:
        raise CorruptionError(f"the shard has {found} bytes, but the index says {size}", where=str(path), fix=REINDEX)
