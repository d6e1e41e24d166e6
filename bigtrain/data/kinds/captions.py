"""Images with a caption: `KEY.png` or `.jpg` with `KEY.txt`, or with the caption's tokens in `KEY.npy`.

A row of the sidecar holds byte offset and bytes of the image, then byte offset, bytes, number of tokens and
`CaptionForm` of the caption.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.accounting import BadSample, PassedOver
from bigtrain.data.formats.images import IMAGE_SUFFIXES, ImageInfo
from bigtrain.data.formats.npy import npy_bytes
from bigtrain.data.formats.stored_tokens import StoredTokens, needs_tokenizer
from bigtrain.data.formats.tar import TarSample, samples
from bigtrain.data.formats.text import MAX_CAPTION_BYTES, TEXT_MEMBERS, decode_caption, encode_document
from bigtrain.data.index import REINDEX, ShardIndex, advice_on_shards
from bigtrain.data.kind import SampleKind, Scanner
from bigtrain.data.kinds.images import (
    ImageSizes,
    black,
    check_image_size,
    common_size,
    example_images,
    first_size,
    has_caption,
    image_text,
    images_under,
    packed_image,
    read_image,
    require_same_images,
)
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.sample import Means, PackedMember, Sample, Span
from bigtrain.data.reading import Reader, SampleReader, read_bytes
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows, spans_fit
from bigtrain.data.streaming.store import ShardStore
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS, Arrays
from bigtrain.storage import hashes

if TYPE_CHECKING:
    from bigtrain.models.config import ModelConfig

IMAGE_KEYS = ("image", "file_name")
"""Keys under which a JSON line can name its image."""
MAX_LINE_BYTES = 1 << 20
PREVIEW_TOKENS = 256
TOKENS_COLUMN = 4


class CaptionForm(IntEnum):
    """How a caption is stored."""

    TEXT = 0
    GZIP = 1
    TOKENS = 2
    """Little-endian token ids of the index's `dtype`."""


@KINDS.register
class Captions(SampleKind):
    """Images of one size, each with a text."""

    name = "captions"
    unit = "captions"
    counted = "tokens"
    layout = "KEY.png or .jpg with KEY.txt"
    of_tokens = takes_image = needs_tokenizer = True
    options = frozenset({"tokenizer", "image_size", "key"})

    def columns(self, index: ShardIndex) -> int:
        """See the module's docstring."""
        return 6

    def is_complete(self, index: ShardIndex) -> bool:
        """See `SampleKind`."""
        return all((index.dtype, index.tokenizer, index.image))

    def outputs(self, index: ShardIndex) -> int:
        """Size of the vocabulary."""
        assert index.tokenizer is not None
        return index.tokenizer.vocab_size

    def token_column(self, text: bool) -> int | None:
        """See `SampleKind`."""
        return TOKENS_COLUMN

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """See `SampleKind`."""
        stored = rows[:, 5] == CaptionForm.TOKENS
        width = np.dtype(index.dtype).itemsize
        counts = rows[:, TOKENS_COLUMN]
        return bool(
            spans_fit(rows[:, 0], rows[:, 1], shard.filesize)
            and spans_fit(rows[:, 2], rows[:, 3], shard.filesize)
            and int(rows[:, 5].max()) <= max(CaptionForm)
            and (rows[:, 3] <= MAX_CAPTION_BYTES).all()
            and (rows[stored, 3] == counts[stored] * width).all()
            and (counts <= shard.tokens).all()
            and int(counts.sum()) == shard.tokens
        )

    def filled(self, index: ShardIndex, context: int) -> int:
        """See `SampleKind`."""
        return sum(int(np.minimum(counts, context).sum()) for counts in index.all_token_counts())

    def cut(self, index: ShardIndex, context: int) -> int:
        """Number of captions that are longer than `context` tokens."""
        return sum(int((counts > context).sum()) for counts in index.all_token_counts())

    def describe(self, index: ShardIndex) -> str | None:
        """Shape of the images, as HEIGHT x WIDTH x CHANNELS."""
        return image_text(index)

    def preview(self, index: ShardIndex, lines: int) -> list[str]:
        """The first captions."""
        shard = next(number for number, entry in enumerate(index.shards) if entry.nsamples)
        count = min(lines, index.shards[shard].nsamples)
        reader = CaptionReader(index, PREVIEW_TOKENS)
        batch = reader.read(np.full(count, shard), np.arange(count))
        reader.close()
        tokenizer = index.load_tokenizer()
        found = []
        for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
            kept = tokens[(weights > 0) & (tokens != tokenizer.eot)]
            found.append(" ".join(tokenizer.decode(kept).split()))
        return found

    def require_same(self, index: ShardIndex, other: ShardIndex) -> None:
        """Require images of equal shape."""
        require_same_images(index, other)

    def check_model(self, index: ShardIndex, config: ModelConfig) -> None:
        """Require images of the size that the model takes."""
        check_image_size(index, config)

    def recognises(self, sample: TarSample) -> bool:
        """Whether the sample has an image and a caption."""
        return bool(sample.suffixes & set(IMAGE_SUFFIXES)) and has_caption(sample)

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """See `SampleKind`."""
        if not first.suffixes & set(TEXT_MEMBERS):
            return _StoredCaptions()
        if tokenizer is None:
            raise needs_tokenizer(first)
        return _WrittenCaptions(tokenizer)

    def common_image(self, scans: Sequence[tuple[Path, Scan]]) -> ImageInfo | None:
        """See `SampleKind`."""
        return common_size(scans)

    def named(self, scan: Scan) -> str:
        """See `SampleKind`."""
        return "captions as text" if scan.text_bytes is not None else super().named(scan)

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """Find folders and tars of NAME.png|jpg with NAME.txt, and JSON lines that name an image."""
        images: list[CaptionedImage] = []
        for given in inputs:
            path = Path(given)
            if path.is_dir():
                images += _pairs_in_folder(path, options)
            elif not path.is_file():
                raise UserError(f"no such file or directory: {str(given)!r}")
            elif path.suffix == ".tar":
                images += _pairs_in_tar(path, options.passed)
            elif path.suffix in (".jsonl", ".ndjson"):
                images += _pairs_in_lines(path, options.key, options.passed)
            else:
                raise UserError(
                    "captions cannot be read from this file", str(path), "Give a folder, a .tar, or a .jsonl file."
                )
        if len(images) < 2:
            raise UserError(
                "there are no images with captions",
                ", ".join(map(str, inputs)),
                advice_on_shards(inputs)
                or "Give NAME.png or .jpg and NAME.txt in folders or tars, or JSON lines with `image`.",
            )
        size = first_size((one.image for one in images), options)
        return [replace(one, size=size) for one in images]

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """See `SampleKind`."""
        return CaptionReader(index, context, open_shards, store)

    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        """images uint8 (B, height, width, channels); tokens int64, weights float32 (B, C); keys int64 (B,)."""
        keys = random.integers(0, 2**62, count)
        images = example_images(config, count, random)
        lengths = random.integers(1, config.context + 1, (count, 1))
        return {
            "keys": keys,
            "images": images,
            "tokens": random.integers(0, max(1, vocabulary), (count, config.context)),
            "weights": (np.arange(config.context) < lengths).astype(np.float32),
        }


class CaptionReader(SampleReader):
    """Reads images with captions, which are cut or padded to `context` tokens."""

    is_thread_safe: ClassVar[bool] = True

    def __init__(self, index: ShardIndex, context: int, open_shards: int = 16, store: ShardStore | None = None) -> None:
        super().__init__(index, open_shards, store)
        self._context = context

    def blank(self, count: int) -> Arrays:
        """images uint8 (n, height, width, channels); tokens int64 (n, C); weights float32 (n, C).

        The tokens of a caption and its end-of-text token have weight one; padding is token 0 with weight zero. A
        caption of more than C tokens loses its end.
        """
        return {
            "images": black(self._index, count),
            "tokens": np.zeros((count, self._context), np.int64),
            "weights": np.zeros((count, self._context), np.float32),
        }

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        arrays["images"][place] = read_image(self._index, descriptor, row[0], row[1], where)
        offset, size, count, form = row[2:]
        data = read_bytes(descriptor, offset, size, where)
        if form == CaptionForm.TOKENS:
            ids = np.frombuffer(data, dtype=self._index.dtype).astype(np.int64)
        else:
            ids = encode_document(decode_caption(data, form == CaptionForm.GZIP, where), self._tokenizer)
        if len(ids) != count:
            raise CorruptionError(f"the caption has {len(ids)} tokens, but the index says {count}", where, REINDEX)
        arrays["tokens"][place, : len(ids)] = ids[: self._context]

    def weigh(self, arrays: Arrays, rows: list[list[int]]) -> None:
        """See `SampleReader`."""
        counts = np.asarray([row[4] for row in rows], dtype=np.int64).reshape(-1, 1)
        arrays["weights"][:] = np.arange(self._context) < counts

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._index.load_tokenizer()


class _StoredCaptions(Scanner):
    """Scans captions that are stored as tokens."""

    noun = "image with a caption"

    def __init__(self) -> None:
        self._sizes, self._tokens = ImageSizes(), StoredTokens()

    def add(self, sample: TarSample) -> tuple[int, ...]:
        image = sample.one(*IMAGE_SUFFIXES)
        offset, count, width = self._tokens.place(sample)
        if not 0 < count * width <= MAX_CAPTION_BYTES:
            raise UserError(
                f"the caption has {count} tokens",
                sample.where,
                f"Store tokens of 1 to {MAX_CAPTION_BYTES} bytes in all.",
            )
        self._sizes.add(sample, image)
        self._tokens.keep()
        return image.offset, image.size, offset, count * width, count, CaptionForm.TOKENS

    def result(self, rows: Rows) -> Scan:
        info = self._sizes.info(classes=0)
        return Scan("captions", rows, dtype=self._tokens.dtype, largest_id=self._tokens.largest, image=info)


class _WrittenCaptions(Scanner):
    """Scans captions that are stored as text, which is tokenised on reading."""

    noun = "image with a caption"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sizes, self._tokenizer = ImageSizes(), tokenizer
        self._digest, self._text_bytes = hashes.new_digest(), 0

    def add(self, sample: TarSample) -> tuple[int, ...]:
        image, member = sample.one(*IMAGE_SUFFIXES), sample.one(*TEXT_MEMBERS)
        form = CaptionForm.GZIP if TEXT_MEMBERS[member.suffix] else CaptionForm.TEXT
        data = sample.read(member, MAX_CAPTION_BYTES)
        text = decode_caption(data, form is CaptionForm.GZIP, sample.where)
        ids = encode_document(text, self._tokenizer)
        self._sizes.add(sample, image)
        self._digest.update(ids.astype(self._tokenizer.dtype).tobytes())
        self._text_bytes += len(text.encode("utf-8"))
        return image.offset, image.size, member.offset, member.size, len(ids), form

    def result(self, rows: Rows) -> Scan:
        return Scan(
            "captions",
            rows,
            dtype=self._tokenizer.dtype.str,
            image=self._sizes.info(classes=0),
            text_bytes=self._text_bytes,
            tokens_hash=hashes.named(self._digest),
        )


@dataclass(frozen=True)
class CaptionedImage:
    """An image file with its caption, before it is packed. The caption is a text, or a span of a file."""

    image: Span
    caption: Span | str
    where: str
    compressed: bool = False
    size: tuple[int, int] | None = None
    """Required height and width of the image; None: the image is scaled."""

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return self.image.size + (len(self.caption) if isinstance(self.caption, str) else self.caption.size)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return (self.image.path,) if isinstance(self.caption, str) else (self.image.path, self.caption.path)

    def members(self, means: Means) -> list[PackedMember]:
        """See `Sample`."""
        assert means.tokenizer is not None
        image = packed_image(self.image, means, self.where, self.size)
        if isinstance(self.caption, Span) and self.caption.size > MAX_CAPTION_BYTES:
            raise UserError(f"the caption has more than {MAX_CAPTION_BYTES} bytes", where=self.where)
        data = self.caption.encode("utf-8") if isinstance(self.caption, str) else self.caption.read()
        text = decode_caption(data, self.compressed, self.where)
        tokens = encode_document(text, means.tokenizer).astype(means.tokenizer.dtype)
        return [image, PackedMember("npy", npy_bytes(np.asarray(tokens)), len(text.encode("utf-8")), len(text))]


def _pairs_in_folder(folder: Path, options: PackOptions) -> Iterator[CaptionedImage]:
    for path in images_under(folder, options):
        text = path.with_suffix(".txt")
        if text.is_file():
            yield CaptionedImage(Span.whole(path), Span.whole(text), str(path))
        else:
            fix = f"Write it to {text.name} beside the image."
            options.passed(UserError("the image has no caption", str(path), fix))


def _pairs_in_tar(tar: Path, passed: PassedOver) -> Iterator[CaptionedImage]:
    for sample in samples(tar, passed):
        try:
            image, text = sample.one(*IMAGE_SUFFIXES), sample.one(*TEXT_MEMBERS)
        except UserError as error:
            passed(error)
            continue
        picture, caption = Span(tar, image.size, image.offset), Span(tar, text.size, text.offset)
        yield CaptionedImage(picture, caption, sample.where, TEXT_MEMBERS[text.suffix])


def _pairs_in_lines(file: Path, key: str, bad: BadSample) -> Iterator[CaptionedImage]:
    with open(file, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                path, caption = _named_in_line(line, key, where, file.parent.resolve())
            except UserError as error:
                bad(error)
                continue
            yield CaptionedImage(Span.whole(path), caption, where)


def _named_in_line(line: bytes, key: str, where: str, folder: Path) -> tuple[Path, str]:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"the line has more than {MAX_LINE_BYTES} bytes", where)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not JSON: {error}", where) from None
    names = [value[one] for one in IMAGE_KEYS if one in value] if isinstance(value, dict) else []
    if not names or not isinstance(names[0], str) or "\0" in names[0]:
        raise UserError(f"the line has no image under {' or '.join(IMAGE_KEYS)}", where)
    caption = value.get(key)
    if not isinstance(caption, str) or not _is_utf8(caption):
        raise UserError(f"the line has no text under {key!r}", where, "Name the caption's key with --key.")
    path = folder / names[0]
    # An untrusted file could name any file of this machine.
    if not path.resolve().is_relative_to(folder):
        raise UserError(
            f"the image {names[0][:80]!r} does not lie in the directory of the file",
            where,
            "Move the file to a directory that contains the images.",
        )
    if not path.is_file():
        raise UserError(f"there is no image {names[0][:80]!r}", where)
    return path, caption


def _is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8. JSON can hold half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
