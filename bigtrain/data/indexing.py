"""Indexing: walking tars once to write down where samples lie (`data index`, and after packing).

Tars on a server are fetched one after another, looked at and deleted; their index names where they are.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.images import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    ImageInfo,
    decode_label,
    image_shape,
)
from bigtrain.data.index import (
    INDEX_NAME,
    Kind,
    Rows,
    Shard,
    ShardIndex,
    load_index,
    write_index,
    write_sidecar,
)
from bigtrain.data.remote import tars_at
from bigtrain.data.tar import Member, members, read_at
from bigtrain.data.text import TEXT_MEMBERS, BadSamples, encode_document, read_text
from bigtrain.data.tokenizers import Tokenizer, TokenizerInfo
from bigtrain.objects import Patience, fetch
from bigtrain.storage import hash_file

URL_WORKERS = 4
MAX_TAR_BYTES = 1 << 40

_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER_BYTES = 4096
_NPY_HEADER = re.compile(
    rb"\s*\{\s*'descr':\s*'([<>|=]?[a-zA-Z][0-9]*)',\s*'fortran_order':\s*(?:True|False),"
    rb"\s*'shape':\s*\(([0-9, ]*)\),?\s*\}\s*"
)
_TOKEN_TYPES = ("<u2", "<u4", "<i4", "<i8")
_MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class Scan:
    """What one walk through a tar finds."""

    kind: Kind
    rows: Rows
    dtype: str | None = None
    largest_id: int = -1
    image: ImageInfo | None = None
    text_bytes: int | None = None
    """UTF-8 bytes of text; None for stored tokens and images."""
    tokens_hash: str | None = None

    @property
    def text(self) -> bool:
        """Whether the tar holds text."""
        return self.text_bytes is not None


def index_directory(
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    text_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
    bad: BadSamples | None = None,
) -> ShardIndex:
    """Index a directory's local, uncompressed tars.

    They hold tokens (KEY.npy), images (KEY.png|jpg with KEY.cls|json) or text (KEY.txt, KEY.txt.gz).

    Sidecars and index.json are written beside the tars, which are only read. A directory indexed before keeps
    its tokenizer unless another is given.

    Args:
        directory: Where the tars lie.
        tokenizer: What made their tokens, where that is known; for text what makes them.
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
    if tokenizer is None and former is not None and former.text:
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
    image = _common_image(scans) if first.kind == "images" else None
    largest = max(scan.largest_id for _, scan in scans)
    info = _tokenizer_info(root, tokenizer, former, largest) if first.kind == "tokens" else None
    if tokenizer is not None:
        tokenizer.save(root)
    if first.text:
        text_bytes = sum(scan.text_bytes or 0 for _, scan in scans)
    return write_index(root, first.kind, first.dtype, info, image, text_bytes, shards, first.text, base_url)


def write_shard(path: Path, scan: Scan, root: Path) -> Shard:
    """Write a tar's sidecar into `root`; what an index says of the tar."""
    sidecar = root / f"{path.name.removesuffix('.tar')}.idx.npy"
    counts = scan.rows[:, 2 if scan.text else 1]
    return Shard(
        url=path.name,
        nsamples=len(scan.rows),
        filesize=path.stat().st_size,
        hash=hash_file(path),
        tokens=int(counts.sum()) if scan.kind == "tokens" else 0,
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
        if (scan.kind, scan.dtype, scan.text) != (first.kind, first.dtype, first.text):
            raise UserError(
                f"the shard holds {_named(scan)}; {first_path.name} holds {_named(first)}",
                where=str(path),
                fix="keep one kind and type in a directory",
            )


def _named(scan: Scan) -> str:
    if scan.text:
        return "text"
    return scan.kind if scan.dtype is None else f"{scan.kind} of type {scan.dtype}"


def _common_image(scans: list[tuple[Path, Scan]]) -> ImageInfo:
    infos = [(path, scan.image) for path, scan in scans if scan.image is not None]
    first = infos[0][1]
    for path, info in infos:
        if (info.height, info.width) != (first.height, first.width):
            raise _other_size(str(path), (info.height, info.width), (first.height, first.width))
    return replace(
        first,
        channels=max(info.channels for _, info in infos),
        classes=max(info.classes for _, info in infos),
    )


def _other_size(where: str, found: tuple[int, int], first: tuple[int, int]) -> UserError:
    return UserError(
        f"the image has {found[1]} x {found[0]} pixels; the first has {first[1]} x {first[0]}",
        where=where,
        fix="scale all images of a directory to one size",
    )


def scan_shard(path: Path, tokenizer: Tokenizer | None = None, bad: BadSamples | None = None) -> Scan:
    """Walk one tar: its kind, and where each sample lies.

    Args:
        tokenizer: Tokenises text, to count and hash its tokens.
        bad: What to do with samples that cannot be read; None: raise.

    Raises:
        UserError: A member or a sample that is refused.
        CorruptionError: The tar is damaged or cut short.
    """
    bad = bad or BadSamples()
    samples = itertools.groupby(members(path), key=lambda member: member.key)
    first_key, first_group = next(samples)
    first = list(first_group)
    suffixes = {member.suffix for member in first}
    rest: Iterator[tuple[str, list[Member]]] = ((key, list(group)) for key, group in samples)
    whole = itertools.chain([(first_key, first)], rest)
    if suffixes & set(IMAGE_SUFFIXES):
        return _scan_images(path, whole, bad)
    if "npy" in suffixes:
        return _scan_tokens(path, whole, bad)
    where = f"{path}, sample {first_key!r}"
    if suffixes & set(TEXT_MEMBERS):
        if tokenizer is None:
            raise UserError("text inside tars needs a tokenizer", where, "name one with --tokenizer")
        return _scan_text(path, whole, tokenizer, bad)
    raise UserError(
        f"samples of {', '.join(sorted(suffixes))} are not read",
        where=where,
        fix="samples are tokens (KEY.npy), text (KEY.txt, KEY.txt.gz), or images with labels (KEY.png or .jpg, and "
        "KEY.cls or .json)",
    )


def _one(group: Iterable[Member], suffixes: tuple[str, ...], where: str) -> Member:
    found = [member for member in group if member.suffix in suffixes]
    if len(found) != 1:
        wanted = " or ".join("." + suffix for suffix in suffixes)
        raise UserError(f"the sample has {'no' if not found else 'more than one'} member {wanted}", where=where)
    return found[0]


def _scan_images(path: Path, samples: Iterable[tuple[str, list[Member]]], bad: BadSamples) -> Scan:
    rows, first, channels = [], None, 1
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        try:
            image, label = _one(group, IMAGE_SUFFIXES, where), _one(group, LABEL_SUFFIXES, where)
            if image.size > MAX_IMAGE_BYTES or label.size > MAX_LABEL_BYTES:
                raise UserError("the sample is larger than images and labels may be", where=where)
            height, width, depth = image_shape(read_at(path, image.offset, image.size), where)
            if first is not None and (height, width) != first:
                raise _other_size(where, (height, width), first)
            number = decode_label(read_at(path, label.offset, label.size), label.suffix, where)
        except UserError as error:
            bad(error)
            continue
        first, channels = (height, width), max(channels, depth)
        rows.append((image.offset, image.size, number))
    if first is None:
        raise UserError("the shard holds no image that can be read", where=str(path))
    table = np.asarray(rows, dtype=np.int64)
    return Scan("images", table, image=ImageInfo(*first, channels, classes=int(table[:, 2].max()) + 1))


def _scan_text(path: Path, samples: Iterable[tuple[str, list[Member]]], tokenizer: Tokenizer, bad: BadSamples) -> Scan:
    rows, text_bytes = [], 0
    digest = xxhash.xxh3_128()
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        try:
            member = _one(group, tuple(TEXT_MEMBERS), where)
            compressed = TEXT_MEMBERS[member.suffix]
            text = read_text(path, member.offset, member.size, compressed, where)
        except UserError as error:
            bad(error)
            continue
        if not text:
            continue
        ids = encode_document(text, tokenizer)
        digest.update(ids.astype(tokenizer.dtype).tobytes())
        text_bytes += len(text.encode("utf-8"))
        rows.append((member.offset, member.size, len(ids), int(compressed)))
    if not rows:
        raise UserError("the shard holds no text", where=str(path))
    return Scan(
        "tokens",
        np.asarray(rows, dtype=np.int64),
        dtype=tokenizer.dtype.str,
        text_bytes=text_bytes,
        tokens_hash=f"xxh3:{digest.hexdigest()}",
    )


def _scan_tokens(path: Path, samples: Iterable[tuple[str, list[Member]]], bad: BadSamples) -> Scan:
    rows, dtype, largest = [], None, -1
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        try:
            found, offset, length = _npy_layout(raw, _one(group, ("npy",), where), where)
            if dtype not in (None, found):
                raise UserError(f"the tokens are stored as {found}, those before as {dtype}", where=where)
            high = _largest_id(raw[offset : offset + length * np.dtype(found).itemsize].view(found), where)
        except UserError as error:
            bad(error)
            continue
        dtype, largest = found, max(largest, high)
        rows.append((offset, length))
    if largest < 0:
        raise UserError("the shard holds no token", where=str(path))
    return Scan("tokens", np.asarray(rows, dtype=np.int64), dtype=dtype, largest_id=largest)


def _largest_id(tokens: np.ndarray, where: str) -> int:
    """The largest of some tokens, -1 for none."""
    if not len(tokens):
        return -1
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > _MAX_ID:
        raise UserError(f"{low if low < 0 else high} is not a token", where=where)
    return high


def _npy_layout(raw: np.ndarray, member: Member, where: str) -> tuple[str, int, int]:
    """Type, byte offset in the tar and number of tokens of a 1-D .npy member; its header is not evaluated."""
    head = bytes(raw[member.offset : member.offset + min(member.size, _NPY_HEADER_BYTES)])
    version = head[6] if len(head) > 12 else 0
    if not head.startswith(_NPY_MAGIC) or version not in (1, 2, 3):
        raise UserError("the member is not a .npy array", where=where)
    start = 10 if version == 1 else 12
    begin = start + int.from_bytes(head[8:start], "little")
    match = _NPY_HEADER.fullmatch(head[start:begin])
    shape = [int(part) for part in match.group(2).split(b",") if part.strip()] if match else []
    dtype = match.group(1).decode() if match else "unknown"
    if dtype not in _TOKEN_TYPES or len(shape) != 1:
        raise UserError(
            f"the array is not a list of tokens (type {dtype}, {len(shape)} dimensions)",
            where=where,
            fix=f"store one dimension of {', '.join(_TOKEN_TYPES)}",
        )
    width = np.dtype(dtype).itemsize
    if begin + shape[0] * width != member.size or (member.offset + begin) % width:
        raise UserError("the array's header does not fit its bytes", where=where)
    return dtype, member.offset + begin, shape[0]
