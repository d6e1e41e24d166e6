"""Packing images (`bigtrain data pack --images` and `--captions`).

With classes they lie in one folder a class. With captions, each beside a text of its name in a folder or a tar, or
named by the lines of a JSON lines file; captions are tokenised here, as text is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, image_shape, squared
from bigtrain.data.formats.npy import npy_bytes
from bigtrain.data.formats.tar import members
from bigtrain.data.formats.text import MAX_CAPTION_BYTES, TEXT_MEMBERS, decode_caption, encode_document
from bigtrain.data.packing.documents import SHARD_BYTES, PackSummary
from bigtrain.data.packing.samples import Means, Member, Stretch, pack_samples
from bigtrain.data.tokenizers import Tokenizer

CLASSES_NAME = "classes.json"
IMAGE_KEYS = ("image", "file_name")
"""Keys under which a JSON line may name its image."""
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class."""

    image: Stretch
    label: int

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return self.image.size

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return (self.image.path,)

    def members(self, means: Means) -> list[Member]:
        """See `Sample`."""
        return [_image_member(self.image, means, str(self.image.path)), Member("cls", str(self.label).encode())]


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its caption: text, or where it lies."""

    image: Stretch
    caption: Stretch | str
    where: str
    compressed: bool = False

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return self.image.size + (len(self.caption) if isinstance(self.caption, str) else self.caption.size)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return (self.image.path,) if isinstance(self.caption, str) else (self.image.path, self.caption.path)

    def members(self, means: Means) -> list[Member]:
        """See `Sample`."""
        assert means.tokenizer is not None
        image = _image_member(self.image, means, self.where)
        if isinstance(self.caption, Stretch) and self.caption.size > MAX_CAPTION_BYTES:
            raise UserError(f"the caption has more than {MAX_CAPTION_BYTES} bytes", where=self.where)
        data = self.caption.encode("utf-8") if isinstance(self.caption, str) else self.caption.read()
        text = decode_caption(data, self.compressed, self.where)
        tokens = encode_document(text, means.tokenizer).astype(means.tokenizer.dtype)
        return [image, Member("npy", npy_bytes(np.asarray(tokens)), len(text.encode("utf-8")), len(text))]


def _image_member(image: Stretch, means: Means, where: str) -> Member:
    if image.size > MAX_IMAGE_BYTES:
        raise UserError(f"the image has more than {MAX_IMAGE_BYTES} bytes", where)
    data = image.read()
    if means.image_size is not None:
        return Member("png", squared(data, means.image_size, where))
    image_shape(data, where)
    return Member("png" if data.startswith(b"\x89PNG") else "jpg", data)


def pack_images(folder: str | Path, out: str | Path, *, shard_bytes: int = SHARD_BYTES, **options: Any) -> PackSummary:
    """Pack FOLDER/CLASS/IMAGE.png|jpg into OUT/train, and OUT/validation where `validation` is above zero.

    Classes are numbered by their sorted names, which OUT/train/classes.json lists.

    Args:
        options: See `pack_samples`.

    Raises:
        UserError: No images, images of several sizes, or what `pack` raises for its output.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no directory at {str(folder)!r}")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    images = [
        LabelledImage(Stretch.whole(path), label)
        for label, name in enumerate(classes)
        for path in _images_under(root / name)
    ]
    if len(images) < 2:
        raise UserError("there are no images", str(folder), "they are read from FOLDER/CLASS/NAME.png or .jpg")
    return pack_samples("images", images, out, shard_bytes=shard_bytes, notes={CLASSES_NAME: classes}, **options)


def pack_captions(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    key: str = "text",
    shard_bytes: int = SHARD_BYTES,
    **options: Any,
) -> PackSummary:
    """Pack images with captions into OUT/train, and OUT/validation where `validation` is above zero.

    Args:
        inputs: Folders of NAME.png|jpg and NAME.txt, at any depth; tars of such pairs; JSON lines files that name an
            image under `image` or `file_name`, by a path that begins at the file and stays below its folder.
        key: The key of a JSON line that holds the caption.
        options: See `pack_samples`.

    Raises:
        UserError: No pairs, an image without a caption, images of several sizes, or what `pack` raises for its output.
    """
    images: list[CaptionedImage] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            images += _pairs_in_folder(path)
        elif not path.is_file():
            raise UserError(f"no such file or directory: {str(given)!r}")
        elif path.suffix == ".tar":
            images += _pairs_in_tar(path)
        elif path.suffix in (".jsonl", ".ndjson"):
            images += _pairs_in_lines(path, key)
        else:
            raise UserError(
                "captions are not read from such a file", str(path), "give a folder, a .tar, or a .jsonl file"
            )
    if len(images) < 2:
        raise UserError(
            "there are no images with captions",
            ", ".join(map(str, inputs)),
            "they are read from NAME.png or .jpg and NAME.txt in folders and tars, or from JSON lines with `image`",
        )
    return pack_samples("captions", images, out, tokenizer=tokenizer, shard_bytes=shard_bytes, **options)


def _images_under(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower()[1:] in IMAGE_SUFFIXES and path.is_file()]


def _pairs_in_folder(folder: Path) -> Iterator[CaptionedImage]:
    for path in _images_under(folder):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise UserError("the image has no caption", str(path), f"write it to {text.name} beside the image")
        yield CaptionedImage(Stretch.whole(path), Stretch.whole(text), str(path))


def _pairs_in_tar(tar: Path) -> Iterator[CaptionedImage]:
    for key, group in groupby(members(tar), key=lambda member: member.key):
        found = list(group)
        images = [member for member in found if member.suffix in IMAGE_SUFFIXES]
        texts = [member for member in found if member.suffix in TEXT_MEMBERS]
        where = f"{tar}, sample {key!r}"
        if len(images) != 1 or len(texts) != 1:
            raise UserError(f"the sample has {len(images)} images and {len(texts)} texts, not one of each", where)
        image, text = (Stretch(tar, member.size, member.offset) for member in (images[0], texts[0]))
        yield CaptionedImage(image, text, where, TEXT_MEMBERS[texts[0].suffix])


def _pairs_in_lines(file: Path, key: str) -> Iterator[CaptionedImage]:
    folder = file.parent.resolve()
    with open(file, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            name, caption = _named_in_line(line, key, where)
            path = folder / name
            # A list from elsewhere could name any file of this machine.
            if not path.resolve().is_relative_to(folder):
                raise UserError(f"the image {name[:80]!r} does not lie below the file", where, "move the file above it")
            if not path.is_file():
                raise UserError(f"there is no image {name[:80]!r}", where)
            yield CaptionedImage(Stretch.whole(path), caption, where)


def _named_in_line(line: bytes, key: str, where: str) -> tuple[str, str]:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"the line has more than {MAX_LINE_BYTES} bytes", where)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not JSON: {error}", where) from None
    names = [value[one] for one in IMAGE_KEYS if one in value] if isinstance(value, dict) else []
    if not names or not isinstance(names[0], str) or "\0" in names[0]:
        raise UserError(f"the line names no image under {' or '.join(IMAGE_KEYS)}", where)
    caption = value.get(key)
    if not isinstance(caption, str) or not _sound(caption):
        raise UserError(f"the line has no text under {key!r}", where, "name the caption's key with --key")
    return names[0], caption


def _sound(text: str) -> bool:
    """Whether a text has a UTF-8 form: JSON can hold half a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
