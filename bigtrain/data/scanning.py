"""Walking one tar: what kind of samples it holds, and where each of them lies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.arrays import LABELS, MAX_ARRAYS, ArrayInfo, array_info, array_name
from bigtrain.data.formats.images import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    ImageInfo,
    decode_label,
    image_shape,
)
from bigtrain.data.formats.npy import HEADER_BYTES, NpyLayout, npy_layout
from bigtrain.data.formats.tar import Member, members, read_at
from bigtrain.data.formats.text import (
    MAX_CAPTION_BYTES,
    TEXT_MEMBERS,
    BadSamples,
    decode_caption,
    encode_document,
    read_text,
)
from bigtrain.data.index import CaptionForm, Kind, Rows
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.storage import hashes

_TOKEN_TYPES = ("<u2", "<u4", "<i4", "<i8")
_MAX_ID = 2**31 - 1

_Samples = Iterable[tuple[str, list[Member]]]


@dataclass(frozen=True)
class Scan:
    """What one walk through a tar finds."""

    kind: Kind
    rows: Rows
    dtype: str | None = None
    largest_id: int = -1
    image: ImageInfo | None = None
    text_bytes: int | None = None
    """UTF-8 bytes of text or of captions; None for stored tokens, images and arrays."""
    tokens_hash: str | None = None
    arrays: tuple[ArrayInfo, ...] | None = None
    classes: int | None = None
    """One more than the largest class beside arrays; None where there are none."""

    @property
    def text(self) -> bool:
        """Whether the tar holds text alone."""
        return self.kind == "tokens" and self.text_bytes is not None


def scan_shard(
    path: Path, tokenizer: Tokenizer | None = None, bad: BadSamples | None = None, kind: Kind | None = None
) -> Scan:
    """Walk one tar: its kind, and where each sample lies.

    Args:
        tokenizer: Tokenises text, to count and hash its tokens.
        bad: What to do with samples that cannot be read; None: raise.
        kind: What the samples are, where it is known; None: what the first one looks like.

    Raises:
        UserError: A member or a sample that is refused.
        CorruptionError: The tar is damaged or cut short.
    """
    bad = bad or BadSamples()
    samples = itertools.groupby(members(path), key=lambda member: member.key)
    first_key, first_group = next(samples)
    first = list(first_group)
    rest: Iterator[tuple[str, list[Member]]] = ((key, list(group)) for key, group in samples)
    whole = itertools.chain([(first_key, first)], rest)
    suffixes = {member.suffix for member in first}
    where = f"{path}, sample {first_key!r}"
    text = bool(suffixes & set(TEXT_MEMBERS))
    needs_tokenizer = UserError("text inside tars needs a tokenizer", where, "name one with --tokenizer")
    if kind == "images" or (kind is None and suffixes & set(IMAGE_SUFFIXES) and not _has_caption(suffixes)):
        return _scan_images(path, whole, bad)
    if kind == "captions" or (kind is None and suffixes & set(IMAGE_SUFFIXES)):
        if text and tokenizer is None:
            raise needs_tokenizer
        return _scan_captions(path, whole, tokenizer if text else None, bad)
    if kind == "arrays" or (kind is None and _holds_arrays(path, first)):
        return _scan_arrays(path, whole, bad)
    if "npy" in suffixes:
        return _scan_tokens(path, whole, bad)
    if text:
        if tokenizer is None:
            raise needs_tokenizer
        return _scan_text(path, whole, tokenizer, bad)
    raise UserError(
        f"samples of {', '.join(sorted(suffixes))} are not read",
        where=where,
        fix="samples are tokens (KEY.npy), text (KEY.txt, KEY.txt.gz), images (KEY.png or .jpg) with classes (KEY.cls, "
        "KEY.json) or captions (KEY.txt), or arrays (KEY.npy, KEY.NAME.npy; KEY.cls)",
    )


def _has_caption(suffixes: set[str]) -> bool:
    """Whether an image has a caption beside it. A class number goes first: it is there for no other purpose."""
    return "cls" not in suffixes and bool(suffixes & {*TEXT_MEMBERS, "npy"})


def _holds_arrays(path: Path, sample: list[Member]) -> bool:
    """Whether the .npy members of a sample are arrays and not tokens: they have names, classes, other types or axes."""
    suffixes = [member.suffix for member in sample]
    if any(suffix.endswith(".npy") for suffix in suffixes):
        return True
    if "npy" not in suffixes:
        return False
    if "cls" in suffixes:
        return True
    layout = _layout(_mapped(path), sample[suffixes.index("npy")], f"{path}, sample {sample[0].key!r}")
    return layout.dtype not in _TOKEN_TYPES or len(layout.shape) != 1


def _one(group: Iterable[Member], suffixes: tuple[str, ...], where: str) -> Member:
    found = [member for member in group if member.suffix in suffixes]
    if len(found) != 1:
        wanted = " or ".join("." + suffix for suffix in suffixes)
        raise UserError(f"the sample has {'no' if not found else 'more than one'} member {wanted}", where=where)
    return found[0]


def other_size(where: str, found: tuple[int, int], first: tuple[int, int]) -> UserError:
    """The error of an image whose height and width are not those of the first."""
    return UserError(
        f"the image has {found[1]} x {found[0]} pixels; the first has {first[1]} x {first[0]}",
        where=where,
        fix="scale all images of a directory to one size",
    )


def _image(
    path: Path, group: list[Member], first: tuple[int, int] | None, where: str
) -> tuple[Member, tuple[int, int], int]:
    """The image of a sample, its height and width, which must be those of the first, and its channels."""
    image = _one(group, IMAGE_SUFFIXES, where)
    if image.size > MAX_IMAGE_BYTES:
        raise UserError("the sample is larger than images and labels may be", where=where)
    height, width, channels = image_shape(read_at(path, image.offset, image.size), where)
    if first is not None and (height, width) != first:
        raise other_size(where, (height, width), first)
    return image, (height, width), channels


def _label(path: Path, group: list[Member], suffixes: tuple[str, ...], where: str) -> int:
    label = _one(group, suffixes, where)
    if label.size > MAX_LABEL_BYTES:
        raise UserError("the sample is larger than images and labels may be", where=where)
    return decode_label(read_at(path, label.offset, label.size), label.suffix, where)


def _scan_images(path: Path, samples: _Samples, bad: BadSamples) -> Scan:
    rows, first, channels = [], None, 1
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        try:
            # Before the image is opened: a sample without its label is told by what it lacks.
            _one(group, IMAGE_SUFFIXES, where), _one(group, LABEL_SUFFIXES, where)
            image, shape, depth = _image(path, group, first, where)
            number = _label(path, group, LABEL_SUFFIXES, where)
        except UserError as error:
            bad(error)
            continue
        first, channels = shape, max(channels, depth)
        rows.append((image.offset, image.size, number))
    if first is None:
        raise UserError("the shard holds no image that can be read", where=str(path))
    table = np.asarray(rows, dtype=np.int64)
    return Scan("images", table, image=ImageInfo(*first, channels, classes=int(table[:, 2].max()) + 1))


def _scan_captions(path: Path, samples: _Samples, tokenizer: Tokenizer | None, bad: BadSamples) -> Scan:
    """Images with text, or without a tokenizer with stored tokens."""
    rows, first, channels, raw = [], None, 1, _mapped(path)
    dtype = None if tokenizer is None else tokenizer.dtype.str
    text_bytes, largest, digest = 0, -1, hashes.new_digest()
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        try:
            image, shape, depth = _image(path, group, first, where)
            if tokenizer is None:
                place, found = _stored_caption(raw, group, where)
                if dtype not in (None, found):
                    raise UserError(f"the tokens are stored as {found}, those before as {dtype}", where=where)
                dtype = found
                largest = max(largest, _largest_id(raw[place[0] : place[0] + place[1]].view(dtype), where))
            else:
                place, text = _written_caption(path, group, tokenizer, where)
                digest.update(encode_document(text, tokenizer).astype(tokenizer.dtype).tobytes())
                text_bytes += len(text.encode("utf-8"))
        except UserError as error:
            bad(error)
            continue
        first, channels = shape, max(channels, depth)
        rows.append((image.offset, image.size, *place))
    if first is None:
        raise UserError("the shard holds no image with a caption that can be read", where=str(path))
    return Scan(
        "captions",
        np.asarray(rows, dtype=np.int64),
        dtype=dtype,
        largest_id=largest,
        image=ImageInfo(*first, channels, classes=0),
        text_bytes=None if tokenizer is None else text_bytes,
        tokens_hash=None if tokenizer is None else hashes.named(digest),
    )


_Place = tuple[int, int, int, int]
"""The last columns of a caption's row: byte offset, bytes, tokens, form."""


def _stored_caption(raw: np.ndarray, group: list[Member], where: str) -> tuple[_Place, str]:
    """Where the tokens of a caption lie, and their type."""
    dtype, offset, count = _token_place(raw, _one(group, ("npy",), where), where)
    size = count * np.dtype(dtype).itemsize
    if not 0 < size <= MAX_CAPTION_BYTES:
        raise UserError(f"the caption has {count} tokens", where, f"store 1 to {MAX_CAPTION_BYTES} bytes of them")
    return (offset, size, count, CaptionForm.TOKENS), dtype


def _written_caption(path: Path, group: list[Member], tokenizer: Tokenizer, where: str) -> tuple[_Place, str]:
    """Where the text of a caption lies, and the text."""
    member = _one(group, tuple(TEXT_MEMBERS), where)
    if member.size > MAX_CAPTION_BYTES:
        raise UserError(f"the caption has more than {MAX_CAPTION_BYTES} bytes", where=where)
    form = CaptionForm.GZIP if TEXT_MEMBERS[member.suffix] else CaptionForm.TEXT
    text = decode_caption(read_at(path, member.offset, member.size), form is CaptionForm.GZIP, where)
    return (member.offset, member.size, len(encode_document(text, tokenizer)), form), text


def _scan_text(path: Path, samples: _Samples, tokenizer: Tokenizer, bad: BadSamples) -> Scan:
    rows, text_bytes = [], 0
    digest = hashes.new_digest()
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
        tokens_hash=hashes.named(digest),
    )


def _scan_tokens(path: Path, samples: _Samples, bad: BadSamples) -> Scan:
    rows, dtype, largest = [], None, -1
    raw = _mapped(path)
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        try:
            found, offset, length = _token_place(raw, _one(group, ("npy",), where), where)
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


def _scan_arrays(path: Path, samples: _Samples, bad: BadSamples) -> Scan:
    rows: list[tuple[int, ...]] = []
    first: tuple[ArrayInfo, ...] | None = None
    labelled, raw = False, _mapped(path)
    for key, group in samples:
        where = f"{path}, sample {key!r}"
        try:
            infos, place = _arrays(raw, group, where)
            label = [_label(path, group, ("cls",), where)] if any(m.suffix == "cls" for m in group) else []
            if first is not None and (infos, bool(label)) != (first, labelled):
                raise UserError(
                    f"the sample holds {listed(infos, bool(label))}; the first holds {listed(first, labelled)}",
                    where=where,
                    fix="store one set of names, types and shapes in a directory",
                )
        except UserError as error:
            bad(error)
            continue
        first, labelled = infos, bool(label)
        rows.append((*place, *label))
    if first is None:
        raise UserError("the shard holds no array that can be read", where=str(path))
    table = np.asarray(rows, dtype=np.int64)
    return Scan("arrays", table, arrays=first, classes=int(table[:, -1].max()) + 1 if labelled else None)


def _arrays(raw: np.ndarray, group: list[Member], where: str) -> tuple[tuple[ArrayInfo, ...], tuple[int, ...]]:
    """The arrays of a sample by their names, and where the values of each begin."""
    found: dict[str, tuple[ArrayInfo, int]] = {}
    for member in group:
        name = array_name(member.suffix, where)
        if name is None:
            continue
        if name in found or len(found) == MAX_ARRAYS:
            raise UserError(
                f"the sample has two arrays {name!r}" if name in found else f"the sample has over {MAX_ARRAYS} arrays",
                where=where,
            )
        layout = _layout(raw, member, where)
        found[name] = array_info(name, layout, member.size, where), member.offset + layout.begin
    if not found:
        raise UserError("the sample has no member .npy", where=where)
    names = sorted(found)
    return tuple(found[name][0] for name in names), tuple(found[name][1] for name in names)


def listed(arrays: tuple[ArrayInfo, ...], labelled: bool) -> str:
    """Names, types and shapes, for errors."""
    return ", ".join([*map(str, arrays), *([LABELS] if labelled else [])])


def _largest_id(tokens: np.ndarray, where: str) -> int:
    """The largest of some tokens, -1 for none."""
    if not len(tokens):
        return -1
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > _MAX_ID:
        raise UserError(
            f"{low if low < 0 else high} is not a token",
            where=where,
            fix="an array that is no tokens needs a name: KEY.x.npy",
        )
    return high


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint8, mode="r")


def _layout(raw: np.ndarray, member: Member, where: str) -> NpyLayout:
    return npy_layout(bytes(raw[member.offset : member.offset + min(member.size, HEADER_BYTES)]), where)


def _token_place(raw: np.ndarray, member: Member, where: str) -> tuple[str, int, int]:
    """Type, byte offset in the tar and number of tokens of a 1-D .npy member."""
    layout = _layout(raw, member, where)
    if layout.dtype not in _TOKEN_TYPES or len(layout.shape) != 1:
        raise UserError(
            f"the array is not a list of tokens (type {layout.dtype}, {len(layout.shape)} dimensions)",
            where=where,
            fix=f"store one dimension of {', '.join(_TOKEN_TYPES)}",
        )
    width = np.dtype(layout.dtype).itemsize
    if layout.begin + layout.shape[0] * width != member.size or (member.offset + layout.begin) % width:
        raise UserError("the array's header does not fit its bytes", where=where)
    return layout.dtype, member.offset + layout.begin, layout.shape[0]
