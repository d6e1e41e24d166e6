"""Indexing: scans tars once to record where samples lie (`data index`, and after packing).

Tars on a server are fetched a few at a time, scanned and deleted; their index names the URL of their directory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.images import read_class_names
from bigtrain.data.index import INDEX_NAME, ShardIndex, load_index, write_index
from bigtrain.data.kind import kind_named
from bigtrain.data.scanning import Scan, scan_shard
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import write_sidecar
from bigtrain.data.streaming.remote import tars_at
from bigtrain.data.tokenizers import Tokenizer, TokenizerInfo
from bigtrain.storage import hash_file
from bigtrain.storage.objects import Patience, fetch

URL_WORKERS = 4
MAX_TAR_BYTES = 1 << 40


def index_directory(
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    text_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
    passed: PassedOver | None = None,
    kind: str | None = None,
) -> ShardIndex:
    """Index the local, uncompressed tars of a directory.

    Each sample kind defines which members form a sample (`SampleKind.layout`).

    Sidecars and index.json are written beside the tars, which are only read. If the directory already has an index,
    its tokenizer is kept unless another one is given.

    Args:
        directory: The directory of the tars.
        tokenizer: The tokenizer that made the stored tokens, if known; for text and captions, the one that makes them.
        text_bytes: UTF-8 bytes of the text that the stored tokens encode, if known.
        progress: Called with each tar's name.
        passed: Counts or refuses samples that cannot be read; None: the first one is an error.
        kind: Name of the sample kind; None: the kind that the first sample of each tar looks like.

    Raises:
        UserError: There are no tars, a member is refused, kinds differ between tars, or images have different sizes.
        CorruptionError: A tar is damaged or truncated.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"no directory at {str(directory)!r}")
    paths = sorted(root.glob("*.tar"))
    if not paths:
        packed = [path.name for path in sorted(root.glob("*.t*gz"))]
        fix = f"Decompress {packed[0]}: samples are read at their offset in an uncompressed .tar." if packed else None
        raise UserError("the directory holds no .tar file", where=str(directory), fix=fix)
    if not os.access(root, os.W_OK):
        raise UserError("the directory is not writable, but its index is stored there", where=str(directory))
    former = _former_index(root, tokenizer)
    if tokenizer is None and former is not None and former.is_tokenised_on_reading:
        tokenizer = former.load_tokenizer()
    scans = []
    for path in paths:
        scans.append((path, scan_shard(path, tokenizer, passed, kind)))
        if progress is not None:
            progress(path.name)
    check_common(scans)
    shards = [write_shard(path, scan, root) for path, scan in scans]
    if former is not None and text_bytes is None and [s.hash for s in shards] == [s.hash for s in former.shards]:
        text_bytes = former.text_bytes
    return write_common(root, scans, shards, tokenizer, former, text_bytes)


def index_urls(
    urls: Sequence[str],
    out: str | Path,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] | None = None,
    passed: PassedOver | None = None,
    patience: Patience | None = None,
    kind: str | None = None,
) -> ShardIndex:
    """Index tars on a server into a local directory that runs can name; each tar is fetched once.

    Args:
        urls: URLs of tars in one directory of a server; "{000..099}" stands for a range. On s3 and gs, the URL of a
            directory stands for all tars in it.
        out: A directory that does not exist yet, or is empty.
        tokenizer: See `index_directory`.
        progress: Called with each tar's name, in any order.
        passed: Counts or refuses samples that cannot be read; None: the first one is an error.
        patience: Timeout and number of retries for an unresponsive or failing server.
        kind: Name of the sample kind; None: the kind that the first sample of each tar looks like.

    Raises:
        UserError: A URL is refused, the URLs lie in several directories, or `out` is not empty; see also
            `index_directory`.
        RemoteError: The server cannot be read.
    """
    root = Path(out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{str(out)!r} exists and is not empty", fix="Choose another --out, or delete it.")
    patience = patience or Patience(retries=5)
    place, names = tars_at(urls, patience)
    root.mkdir(parents=True, exist_ok=True)

    def look(name: str) -> tuple[Path, Scan, Shard]:
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as directory:
            path = Path(directory) / name
            with open(path, "w+b") as file:
                fetch(place, name, file, size=None, limit=MAX_TAR_BYTES, patience=patience)
            try:
                scan = scan_shard(path, tokenizer, passed, kind)
            except UserError as error:
                error.where = (error.where or "").replace(str(path), f"{place.url}/{name}")
                raise
            shard = write_shard(path, scan, root)
        if progress is not None:
            progress(name)
        return path, scan, shard

    pool = ThreadPoolExecutor(URL_WORKERS)
    try:
        looked = list(pool.map(look, names))
        scans = [(path, scan) for path, scan, _ in looked]
        check_common(scans)
        return write_common(root, scans, [shard for *_, shard in looked], tokenizer, base_url=place.url)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        for path in root.glob("*.idx.npy"):
            path.unlink()
        raise
    finally:
        pool.shutdown()


def write_common(
    root: Path,
    scans: list[tuple[Path, Scan]],
    shards: list[Shard],
    tokenizer: Tokenizer | None,
    former: ShardIndex | None = None,
    text_bytes: int | None = None,
    base_url: str | None = None,
) -> ShardIndex:
    """Write the index of shards that have been scanned and whose sidecars are written.

    Args:
        former: The previous index of the directory, whose tokenizer is kept if `tokenizer` is None.
    """
    first = scans[0][1]
    image = kind_named(first.kind).common_image(scans)
    largest = max(scan.largest_id for _, scan in scans)
    info = None if first.dtype is None else _tokenizer_info(root, tokenizer, former, largest)
    if tokenizer is not None:
        tokenizer.save(root)
    if first.text_bytes is not None:
        text_bytes = sum(scan.text_bytes or 0 for _, scan in scans)
    classes = None if first.classes is None else max(scan.classes or 0 for _, scan in scans)
    names = read_class_names(root)
    return write_index(
        root, first.kind, first.dtype, info, image, text_bytes, shards, first.text, base_url, first.arrays, classes,
        first.facts, names,
    )  # fmt: skip


def write_shard(path: Path, scan: Scan, root: Path) -> Shard:
    """Write a tar's sidecar into `root`, and return the tar's entry for the index."""
    sidecar = root / f"{path.name.removesuffix('.tar')}.idx.npy"
    kind = kind_named(scan.kind)
    column = kind.token_column(scan.text)
    return Shard(
        url=path.name,
        nsamples=len(scan.rows),
        filesize=path.stat().st_size,
        hash=hash_file(path),
        tokens=0 if column is None else int(scan.rows[:, column].sum()),
        index=sidecar.name,
        index_hash=write_sidecar(sidecar, scan.rows),
        tokens_hash=scan.tokens_hash,
        lengths=kind.lengths(scan.rows),
    )


def _former_index(root: Path, tokenizer: Tokenizer | None) -> ShardIndex | None:
    if not (root / INDEX_NAME).is_file():
        return None
    try:
        return load_index(root)
    except CorruptionError as error:
        if tokenizer is not None:
            return None
        raise UserError(
            f"the existing index, which records the tokenizer, is damaged: {error.what}",
            where=error.where,
            fix=f"Give the tokenizer, or delete {INDEX_NAME} first.",
        ) from None


def _tokenizer_info(
    root: Path, tokenizer: Tokenizer | None, former: ShardIndex | None, largest_id: int
) -> TokenizerInfo:
    info = tokenizer.info if tokenizer is not None else None if former is None else former.tokenizer
    if info is None or info.kind == "unknown":
        return TokenizerInfo("unknown", largest_id + 1, None, "unknown")
    if largest_id >= info.vocab_size:
        raise UserError(
            f"the shards hold the token id {largest_id}, but the tokenizer has {info.vocab_size} tokens",
            where=str(root),
            fix="Give the tokenizer that the tokens were made with.",
        )
    return info


def check_common(scans: list[tuple[Path, Scan]]) -> None:
    """Refuse tars whose samples differ in kind or in other properties that must be equal (`SampleKind.common`).

    Raises:
        UserError: A tar differs from the first one.
    """
    first_path, first = scans[0]
    kind = kind_named(first.kind)
    for path, scan in scans:
        if scan.kind != first.kind or kind.common(scan) != kind.common(first):
            raise UserError(
                f"this shard holds {kind_named(scan.kind).named(scan)}, but {first_path.name} holds "
                f"{kind.named(first)}",
                where=str(path),
                fix="Keep samples of one kind and type in a directory.",
            )
