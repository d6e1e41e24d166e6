"""Reading the structure of local, uncompressed tars: where members lie, and whether they are all there.

Members are never extracted and their names never become paths. What could reach outside the tar (links,
devices, absolute names, "..") is refused, and so is a tar that was cut short, at whichever place.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bigtrain.config import CorruptionError, UserError

BLOCK_BYTES = 512
MAX_MEMBERS = 20_000_000
MAX_MEMBER_BYTES = 1 << 34

# WebDataset's own rule: the key ends at the first dot of the last path component.
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

# Metadata of the whole tar, which WebDataset passes over too.
_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """One regular file of a tar."""

    key: str
    """What the members of one sample share."""
    suffix: str
    """The rest of the name, lower case, without its first dot."""
    offset: int
    """Byte of the tar at which its data begins."""
    size: int


def members(path: str | os.PathLike[str]) -> Iterator[Member]:
    """The regular files of a tar in their order, checked as they come.

    Raises:
        UserError: Not an uncompressed tar; a member that is refused.
        CorruptionError: The tar is damaged or cut short.
    """
    name = os.fspath(path)
    total = os.path.getsize(name)
    _refuse_compressed(name)
    end, count = 0, 0
    try:
        with tarfile.open(name, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
                count += 1
                end = tar.offset
                member = _checked(info, name, count, end, total)
                if member is not None:
                    yield member
    except (tarfile.TarError, ValueError, OverflowError) as error:
        # The last two are of extended headers: lengths that no file has, bytes that are no text.
        raise CorruptionError(f"the tar is damaged or cut short: {error}", where=name, fix=_FETCH_AGAIN) from None
    _check_end(name, end, total, count)


def read_at(path: str | os.PathLike[str], offset: int, size: int) -> bytes:
    """Some bytes of a file.

    Raises:
        CorruptionError: The file ends before.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(descriptor, size, offset)
        while data and len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise CorruptionError("the shard ends before its index says", where=f"{path}, byte {offset + len(data)}")
    return data


_FETCH_AGAIN = "fetch or make the tar again, then run `bigtrain data index` again"


def _refuse_compressed(name: str) -> None:
    with open(name, "rb") as file:
        head = file.read(6)
    for magic, kind in (
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ):
        if head.startswith(magic):
            raise UserError(f"the tar is compressed with {kind}", where=name, fix="decompress it")


def _checked(info: tarfile.TarInfo, name: str, count: int, end: int, total: int) -> Member | None:
    where = f"{name}, member {info.name!r}"
    if info.name.startswith("/") or ".." in Path(info.name).parts or "\0" in info.name:
        raise UserError("the member's name leads out of the tar", where=where, fix="do not use this tar")
    if info.isdir() or _META.match(info.name):
        return None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UserError("a link, a device or a sparse file is refused", where=where, fix="store plain files only")
    if info.size < 0 or end > total:
        raise CorruptionError("the tar is cut short inside this member", where=where, fix=_FETCH_AGAIN)
    if info.size > MAX_MEMBER_BYTES or count > MAX_MEMBERS:
        raise UserError(
            f"the tar is over the limits of {MAX_MEMBER_BYTES} bytes a member and {MAX_MEMBERS} members",
            where=where,
        )
    match = _KEY.match(info.name)
    if match is None:
        raise UserError("the member's name has no suffix", where=where, fix="name it as in 000123.png")
    return Member(match.group(1), match.group(2).lower(), info.offset_data, info.size)


def _check_end(name: str, end: int, total: int, count: int) -> None:
    """A whole tar ends in two blocks of zeros: without them members may be missing, and no reader notices."""
    if count == 0:
        raise UserError("the tar holds no member", where=name)
    if read_tail(name, end) != bytes(2 * BLOCK_BYTES):
        raise CorruptionError(
            f"the tar has no end mark at byte {end} of {total}: cut short or damaged after {count} members",
            where=name,
            fix=_FETCH_AGAIN,
        )


def read_tail(name: str, end: int) -> bytes:
    """Up to two blocks that follow the last member."""
    with open(name, "rb") as file:
        file.seek(end)
        return file.read(2 * BLOCK_BYTES)
