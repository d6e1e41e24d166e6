"""Indexing: walking tars once to write down where samples lie (`data index`, and after packing)."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

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
from bigtrain.data.tar import Member, members, read_at
from bigtrain.data.tokenizers import Tokenizer, TokenizerInfo
from bigtrain.storage import hash_file

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


def index_directory(
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    text_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ShardIndex:
    """Index a directory's local, uncompressed tars of tokens (KEY.npy) or images (KEY.png|jpg, KEY.cls|json).

    Sidecars and index.json are written beside the tars, which are only read. A directory indexed before keeps
    its tokenizer unless another is given.

    Args:
        directory: Where the tars lie.
        tokenizer: What made their tokens, where that is known.
        text_bytes: UTF-8 bytes of the text that the tokens stand for, where known.
        progress: Called with each tar's name.

    Raises:
        UserError: No tars, members that are refused, samples of another kind, images of different sizes.
        CorruptionError: A tar is damaged or cut short.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"no directory at {str(directory)!r}")
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise UserError("the directory holds no .tar file", where=str(directory))
    if not os.access(root, os.W_OK):
        raise UserError("the directory cannot be written to; its index lies there", where=str(directory))
    scans = []
    for path in paths:
        scans.append((path, scan_shard(path)))
        if progress is not None:
            progress(path.name)
    kind, dtype = _common(scans)
    image = _common_image(scans) if kind == "images" else None
    former = _former_index(root, tokenizer)
    largest = max(scan.largest_id for _, scan in scans)
    info = _tokenizer_info(root, tokenizer, former, largest) if kind == "tokens" else None
    if tokenizer is not None:
        tokenizer.save(root)
    shards = [_write_shard(path, scan) for path, scan in scans]
    if former is not None and text_bytes is None and [s.hash for s in shards] == [s.hash for s in former.shards]:
        text_bytes = former.text_bytes
    return write_index(root, kind, dtype, info, image, text_bytes, shards)


def _write_shard(path: Path, scan: Scan) -> Shard:
    sidecar = path.with_suffix(".idx.npy")
    return Shard(
        url=path.name,
        nsamples=len(scan.rows),
        filesize=path.stat().st_size,
        hash=hash_file(path),
        tokens=int(scan.rows[:, 1].sum()) if scan.kind == "tokens" else 0,
        index=sidecar.name,
        index_hash=write_sidecar(sidecar, scan.rows),
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


def _common(scans: list[tuple[Path, Scan]]) -> tuple[Kind, str | None]:
    first_path, first = scans[0]
    for path, scan in scans:
        if (scan.kind, scan.dtype) != (first.kind, first.dtype):
            raise UserError(
                f"the shard holds {_named(scan)}; {first_path.name} holds {_named(first)}",
                where=str(path),
                fix="keep one kind and type in a directory",
            )
    return first.kind, first.dtype


def _named(scan: Scan) -> str:
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


def scan_shard(path: Path) -> Scan:
    """Walk one tar: its kind, and where each sample lies.

    Raises:
        UserError: A member or a sample that is refused.
        CorruptionError: The tar is damaged or cut short.
    """
    samples = itertools.groupby(members(path), key=lambda member: member.key)
    first_key, first_group = next(samples)
    first = list(first_group)
    suffixes = {member.suffix for member in first}
    rest: Iterator[tuple[str, list[Member]]] = ((key, list(group)) for key, group in samples)
    whole = itertools.chain([(first_key, first)], rest)
    if suffixes & set(IMAGE_SUFFIXES):
        return _scan_images(path, whole)
    if "npy" in suffixes:
        return _scan_tokens(path, whole)
    found = ", ".join(sorted(suffixes))
    text = bool(suffixes & {"txt", "txt.gz", "text"})
    raise UserError(
        "text inside tars is not read" if text else f"samples of {found} are not read",
        where=f"{path}, sample {first_key!r}",
        fix="unpack the text and run `bigtrain data pack` on it"
        if text
        else "samples are tokens (KEY.npy) or images with labels (KEY.png or .jpg, and KEY.cls or .json)",
    )


def _one(group: Iterable[Member], suffixes: tuple[str, ...], where: str) -> Member:
    found = [member for member in group if member.suffix in suffixes]
    if len(found) != 1:
        wanted = " or ".join("." + suffix for suffix in suffixes)
        raise UserError(f"the sample has {'no' if not found else 'more than one'} member {wanted}", where=where)
    return found[0]


def _scan_images(path: Path, samples: Iterable[tuple[str, list[Member]]]) -> Scan:
    rows, first, channels = [], None, 1
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        image, label = _one(group, IMAGE_SUFFIXES, where), _one(group, LABEL_SUFFIXES, where)
        if image.size > MAX_IMAGE_BYTES or label.size > MAX_LABEL_BYTES:
            raise UserError("the sample is larger than images and labels may be", where=where)
        height, width, depth = image_shape(read_at(path, image.offset, image.size), where)
        first = first or (height, width)
        if (height, width) != first:
            raise _other_size(where, (height, width), first)
        channels = max(channels, depth)
        number = decode_label(read_at(path, label.offset, label.size), label.suffix, where)
        rows.append((image.offset, image.size, number))
    assert first is not None
    table = np.asarray(rows, dtype=np.int64)
    return Scan("images", table, image=ImageInfo(*first, channels, classes=int(table[:, 2].max()) + 1))


def _scan_tokens(path: Path, samples: Iterable[tuple[str, list[Member]]]) -> Scan:
    rows, dtype, largest = [], None, -1
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        member = _one(group, ("npy",), where)
        found, offset, length = _npy_layout(raw, member, where)
        dtype = dtype or found
        if found != dtype:
            raise UserError(f"the tokens are stored as {found}, those before as {dtype}", where=where)
        if length:
            tokens = raw[offset : offset + length * np.dtype(found).itemsize].view(found)
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high > _MAX_ID:
                raise UserError(f"{low if low < 0 else high} is not a token", where=where)
            largest = max(largest, high)
        rows.append((offset, length))
    if largest < 0:
        raise UserError("the shard holds no token", where=str(path))
    return Scan("tokens", np.asarray(rows, dtype=np.int64), dtype=dtype, largest_id=largest)


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
