"""Indexing: walking tars once to write down where samples lie (`data index`, and after packing).

Tars on a server are fetched one after another, looked at and deleted; their index names where they are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.formats.images import ImageInfo
from bigtrain.data.formats.text import BadSamples
from bigtrain.data.index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    load_index,
    token_column,
    write_index,
    write_sidecar,
)
from bigtrain.data.scanning import Scan, listed, other_size, scan_shard
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
    bad: BadSamples | None = None,
) -> ShardIndex:
    """Index a directory's local, uncompressed tars.

    They hold tokens (KEY.npy), text (KEY.txt, KEY.txt.gz), images (KEY.png|jpg) with classes (KEY.cls|json) or captions
    (KEY.txt, or their tokens in KEY.npy), or arrays (KEY.npy that is no list of whole numbers, KEY.NAME.npy, KEY.cls).

    Sidecars and index.json are written beside the tars, which are only read. A directory indexed before keeps
    its tokenizer unless another is given.

    Args:
        directory: Where the tars lie.
        tokenizer: What made their tokens, where that is known; for text and captions what makes them.
        text_bytes: UTF-8 bytes of the text that the tokens stand for, where known.
        progress: Called with each tar's name.
        bad: What to do with samples that cannot be read; None: raise.

    Raises:
        UserError: No tars, members that are refused, samples of another kind, images of different sizes.
        CorruptionError: A tar is damaged or cut short.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"no directory at {str(directory)!r}")
    paths = sorted(root.glob("*.tar"))
    if not paths:
        packed = [path.name for path in sorted(root.glob("*.t*gz"))]
        fix = f"decompress {packed[0]}: samples are read by their place in a plain .tar" if packed else None
        raise UserError("the directory holds no .tar file", where=str(directory), fix=fix)
    if not os.access(root, os.W_OK):
        raise UserError("the directory cannot be written to; its index lies there", where=str(directory))
    former = _former_index(root, tokenizer)
    if tokenizer is None and former is not None and (former.text or former.captions_are_text):
        tokenizer = former.load_tokenizer()
    scans = []
    for path in paths:
        scans.append((path, scan_shard(path, tokenizer, bad)))
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
    bad: BadSamples | None = None,
    patience: Patience | None = None,
) -> ShardIndex:
    """Index tars on a server into a local directory that runs can name; each tar is read once.

    Args:
        urls: Of tars in one directory of a server; "{000..099}" stands for a range. On s3 and gs a directory may be
            named, for all tars in it.
        out: A directory that does not exist yet, or is empty.
        tokenizer: See `index_directory`.
        progress: Called with each tar's name, in any order.
        bad: What to do with samples that cannot be read; None: raise.
        patience: How long the server is borne with.

    Raises:
        UserError: URLs that are refused or lie in several directories; see `index_directory`.
        RemoteError: The server cannot be read.
    """
    root = Path(out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{str(out)!r} exists and is not empty", fix="choose another --out, or delete it")
    patience = patience or Patience(retries=5)
    place, names = tars_at(urls, patience)
    root.mkdir(parents=True, exist_ok=True)

    def look(name: str) -> tuple[Path, Scan, Shard]:
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as directory:
            path = Path(directory) / name
            with open(path, "w+b") as file:
                fetch(place, name, file, size=None, limit=MAX_TAR_BYTES, patience=patience)
            try:
                scan = scan_shard(path, tokenizer, bad)
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
    """Write the index of shards that were scanned and whose sidecars are written."""
    first = scans[0][1]
    image = _common_image(scans) if first.image is not None else None
    largest = max(scan.largest_id for _, scan in scans)
    info = None if first.dtype is None else _tokenizer_info(root, tokenizer, former, largest)
    if tokenizer is not None:
        tokenizer.save(root)
    if first.text_bytes is not None:
        text_bytes = sum(scan.text_bytes or 0 for _, scan in scans)
    classes = None if first.classes is None else max(scan.classes or 0 for _, scan in scans)
    return write_index(
        root, first.kind, first.dtype, info, image, text_bytes, shards, first.text, base_url, first.arrays, classes
    )


def write_shard(path: Path, scan: Scan, root: Path) -> Shard:
    """Write a tar's sidecar into `root`; what an index says of the tar."""
    sidecar = root / f"{path.name.removesuffix('.tar')}.idx.npy"
    column = token_column(scan.kind, scan.text)
    return Shard(
        url=path.name,
        nsamples=len(scan.rows),
        filesize=path.stat().st_size,
        hash=hash_file(path),
        tokens=0 if column is None else int(scan.rows[:, column].sum()),
        index=sidecar.name,
        index_hash=write_sidecar(sidecar, scan.rows),
        tokens_hash=scan.tokens_hash,
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
            f"the index that is there is damaged, and with it what tokenizer was used: {error.what}",
            where=error.where,
            fix=f"name the tokenizer, or delete {INDEX_NAME} first",
        ) from None


def _tokenizer_info(
    root: Path, tokenizer: Tokenizer | None, former: ShardIndex | None, largest_id: int
) -> TokenizerInfo:
    info = tokenizer.info if tokenizer is not None else None if former is None else former.tokenizer
    if info is None or info.kind == "unknown":
        return TokenizerInfo("unknown", largest_id + 1, None, "unknown")
    if largest_id >= info.vocab_size:
        raise UserError(
            f"the shards hold the token {largest_id}, the tokenizer has {info.vocab_size}",
            where=str(root),
            fix="name the tokenizer that the tokens were made with",
        )
    return info


def check_common(scans: list[tuple[Path, Scan]]) -> None:
    """Refuse shards of several kinds.

    Raises:
        UserError: Names the first that differs.
    """
    first_path, first = scans[0]
    for path, scan in scans:
        if _common(scan) != _common(first):
            raise UserError(
                f"the shard holds {_named(scan)}; {first_path.name} holds {_named(first)}",
                where=str(path),
                fix="keep one kind and type in a directory",
            )


def _common(scan: Scan) -> tuple[object, ...]:
    """What all shards of a directory must have alike."""
    return scan.kind, scan.dtype, scan.text_bytes is None, scan.arrays, scan.classes is None


def _named(scan: Scan) -> str:
    if scan.text:
        return "text"
    if scan.arrays is not None:
        return "arrays: " + listed(scan.arrays, scan.classes is not None)
    if scan.kind == "captions" and scan.text_bytes is not None:
        return "captions as text"
    return scan.kind if scan.dtype is None else f"{scan.kind} of type {scan.dtype}"


def _common_image(scans: list[tuple[Path, Scan]]) -> ImageInfo:
    infos = [(path, scan.image) for path, scan in scans if scan.image is not None]
    first = infos[0][1]
    for path, info in infos:
        if (info.height, info.width) != (first.height, first.width):
            raise other_size(str(path), (info.height, info.width), (first.height, first.width))
    return replace(
        first,
        channels=max(info.channels for _, info in infos),
        classes=max(info.classes for _, info in infos),
    )
