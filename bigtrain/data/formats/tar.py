"""Reads the structure of local, uncompressed tars: where members lie, and whether the tar is complete.

Members are never extracted, and their names never become paths. Members that could reach outside the tar (links,
devices, absolute names, "..") are refused, and so is a tar that is truncated at any position.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.accounting import PassedOver

BLOCK_BYTES = 512
MAX_MEMBERS = 20_000_000
MAX_MEMBER_BYTES = 1 << 34

# WebDataset's own rule: the key ends at the first dot of the last path component.
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

# Metadata of the full tar, which WebDataset skips too.
_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """One regular file of a tar."""

    key: str
    """The part of the name that all members of a sample share."""
    suffix: str
    """The rest of the name in lower case, without its first dot."""
    offset: int
    """Byte of the tar at which the member's data begins."""
    size: int


@dataclass(frozen=True)
class TarSample:
    """The members of a tar that share a key."""

    path: Path
    """The tar."""
    key: str
    members: tuple[Member, ...]

    @property
    def where(self) -> str:
        """Location of the sample, for error messages."""
        return f"{self.path}, sample {self.key!r}"

    @property
    def suffixes(self) -> set[str]:
        """The suffixes of the sample's members."""
        return {member.suffix for member in self.members}

    def one(self, *suffixes: str) -> Member:
        """The only member that has one of these suffixes.

        Raises:
            UserError: There is no such member, or there are several.
        """
        found = [member for member in self.members if member.suffix in suffixes]
        if len(found) != 1:
            wanted = " or ".join("." + suffix for suffix in suffixes)
            raise UserError(f"the sample has {'no' if not found else 'more than one'} member {wanted}", self.where)
        return found[0]

    def read(self, member: Member, limit: int | None = None) -> bytes:
        """The bytes of a member.

        Raises:
            UserError: The member has more than `limit` bytes.
        """
        if limit is not None and member.size > limit:
            raise UserError(f"the member .{member.suffix} has more than {limit} bytes", self.where)
        return read_at(self.path, member.offset, member.size)


def samples(path: Path, passed: PassedOver | None = None) -> Iterator[TarSample]:
    """Yield the samples of a tar in their order: groups of consecutive members with the same key.

    Raises:
        UserError: See `members`; or the tar holds no sample.
    """
    found = False
    for key, group in itertools.groupby(members(path, passed), key=lambda member: member.key):
        found = True
        yield TarSample(path, key, tuple(group))
    if not found:
        raise UserError("the tar holds no sample", str(path), "Give its members names such as 000123.txt.")


def members(path: str | os.PathLike[str], passed: PassedOver | None = None) -> Iterator[Member]:
    """Yield the regular files of a tar in their order, and check each one; also of joined tars (`cat a.tar b.tar`).

    Args:
        passed: Counts the members that WebDataset skips too: hidden ones, such as the ._NAME files of macOS, and those
            without a suffix.

    Raises:
        UserError: The file is compressed, or a member is refused.
        CorruptionError: The tar is damaged or truncated.
    """
    name = os.fspath(path)
    total = os.path.getsize(name)
    _refuse_compressed(name)
    begin: int | None = 0
    count = 0
    with open(name, "rb") as file:
        while begin is not None:
            end = begin
            file.seek(begin)
            try:
                # The library starts at the file's current position, and counts offsets from the start of the file.
                with tarfile.open(name, "r:", fileobj=file) as tar:
                    while (info := tar.next()) is not None:
                        tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
                        count += 1
                        end = tar.offset
                        member = _checked(info, name, count, end, total, passed)
                        if member is not None:
                            yield member
            except (tarfile.TarError, ValueError, OverflowError) as error:
                # Extended headers raise the last two: impossible lengths, and bytes that are no text.
                raise CorruptionError(f"the tar is damaged or cut short: {error}", name, _FETCH_AGAIN) from None
            _check_end(name, end, total, count)
            begin = _next_part(file, end + 2 * BLOCK_BYTES)


def _next_part(file: BinaryIO, start: int) -> int | None:
    """The byte at which the next of several joined tars begins; None if only zeros follow."""
    file.seek(start)
    position = start
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            inside = len(block) - len(block.lstrip(b"\0"))
            return position + inside // BLOCK_BYTES * BLOCK_BYTES
        position += len(block)
    return None


def read_at(path: str | os.PathLike[str], offset: int, size: int) -> bytes:
    """Read `size` bytes of a file at an offset.

    Raises:
        CorruptionError: The file ends before the last of these bytes.
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
        raise CorruptionError("the shard is shorter than its index says", where=f"{path}, byte {offset + len(data)}")
    return data


_FETCH_AGAIN = "Download or make the tar again, then run `bigtrain data index` again."


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
            raise UserError(f"the tar is compressed with {kind}", where=name, fix="Decompress it.")


def _checked(
    info: tarfile.TarInfo, name: str, count: int, end: int, total: int, passed: PassedOver | None
) -> Member | None:
    where = f"{name}, member {info.name!r}"
    if info.name.startswith("/") or ".." in Path(info.name).parts or "\0" in info.name:
        raise UserError("the member's name points outside the tar", where=where, fix="Do not use this tar.")
    if info.isdir() or _META.match(info.name):
        return None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UserError("a link, a device or a sparse file is refused", where=where, fix="Store plain files only.")
    if info.size < 0 or end > total:
        raise CorruptionError("the tar is cut short inside this member", where=where, fix=_FETCH_AGAIN)
    if info.size > MAX_MEMBER_BYTES or count > MAX_MEMBERS:
        raise UserError(
            f"the tar is over the limits of {MAX_MEMBER_BYTES} bytes a member and {MAX_MEMBERS} members",
            where=where,
        )
    match = _KEY.match(info.name)
    hidden = info.name.rpartition("/")[2].startswith(".")
    if match is None or hidden:
        if passed is not None:
            passed.ignore(f"{name}:{info.name}", "a hidden member" if hidden else "a member without a suffix")
        return None
    return Member(match.group(1), match.group(2).lower(), info.offset_data, info.size)


def _check_end(name: str, end: int, total: int, count: int) -> None:
    """Refuse a tar without two blocks of zeros at its end: members may be missing, which no reader would notice."""
    if count == 0:
        raise UserError("the tar holds no member", where=name)
    if read_tail(name, end) != bytes(2 * BLOCK_BYTES):
        raise CorruptionError(
            f"the tar has no end mark at byte {end} of {total}: cut short or damaged after {count} members",
            where=name,
            fix=_FETCH_AGAIN,
        )


def read_tail(name: str, end: int) -> bytes:
    """Read up to two blocks after the last member."""
    with open(name, "rb") as file:
        file.seek(end)
        return file.read(2 * BLOCK_BYTES)
