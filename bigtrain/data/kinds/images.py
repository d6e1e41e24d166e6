"""Images with a class: `KEY.png` or `.jpg` with `KEY.cls` (or with a class number in `KEY.json`)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats import picture_tables
from bigtrain.data.formats.arrays import LABELS
from bigtrain.data.formats.images import (
    CLASSES_NAME,
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    ImageInfo,
    decode_image,
    decode_label,
    image_shape,
    image_suffix,
    squared,
)
from bigtrain.data.formats.tar import Member, TarSample, samples
from bigtrain.data.formats.text import TEXT_MEMBERS
from bigtrain.data.index import ShardIndex, advice_on_shards
from bigtrain.data.kind import SampleKind, Scanner
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.sample import Means, PackedMember, Sample, Span
from bigtrain.data.reading import Reader, SampleReader, read_bytes
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows, spans_fit
from bigtrain.data.streaming.store import ShardStore
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS, Arrays

if TYPE_CHECKING:
    from bigtrain.models.config import ModelConfig


@KINDS.register
class Images(SampleKind):
    """Images of one size and their classes."""

    name = "images"
    unit = "images"
    layout = "KEY.png or .jpg with KEY.cls or KEY.json"
    options = frozenset({"image_size"})

    def columns(self, index: ShardIndex) -> int:
        """Three columns: byte offset and bytes of the image, and the class."""
        return 3

    def is_complete(self, index: ShardIndex) -> bool:
        """See `SampleKind`."""
        return index.image is not None

    def outputs(self, index: ShardIndex) -> int:
        """Number of classes."""
        assert index.image is not None
        return index.image.classes

    def class_column(self, index: ShardIndex) -> int | None:
        """See `SampleKind`."""
        return 2

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """See `SampleKind`."""
        return spans_fit(rows[:, 0], rows[:, 1], shard.filesize) and int(rows[:, 2].max()) < self.outputs(index)

    def describe(self, index: ShardIndex) -> str | None:
        """Shape of the images, as HEIGHT x WIDTH x CHANNELS."""
        return image_text(index)

    def require_same(self, index: ShardIndex, other: ShardIndex) -> None:
        """Require equal shapes, no more classes in `other`, and the same names of classes if both have names."""
        require_same_images(index, other)
        require_same_names(index, other, "Pack both with the same class folders: an empty folder counts as a class.")

    def check_model(self, index: ShardIndex, config: ModelConfig) -> None:
        """Require images of the size that the model takes."""
        check_image_size(index, config)

    def recognises(self, sample: TarSample) -> bool:
        """Whether the sample has an image, and a class or no caption. A member .cls takes precedence over a caption."""
        return bool(sample.suffixes & set(IMAGE_SUFFIXES)) and not has_caption(sample)

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """See `SampleKind`."""
        return _ImageScanner()

    def common_image(self, scans: Sequence[tuple[Path, Scan]]) -> ImageInfo | None:
        """See `SampleKind`."""
        return common_size(scans)

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """Find images in FOLDER/CLASS/IMAGE.png|jpg (classes in sorted order), or in tars and Parquet with classes."""
        found = _in_files(inputs, options) if _are_files(inputs) else _in_folder(inputs, options)
        size = first_size((one.image for one in found), options)
        if len(found) < 2:
            fix = advice_on_shards(inputs) or f"Give FOLDER/CLASS/NAME.png or .jpg, tars of {self.layout}, or Parquet."
            raise UserError("there are no images", ", ".join(map(str, inputs)), fix)
        return [replace(one, size=size) for one in found]

    def notes(self, inputs: Sequence[str | Path], samples: Sequence[Sample]) -> dict[str, Any]:
        """The names of the classes, if folders or the schema of a Parquet file name them."""
        first = Path(inputs[0])
        if not _are_files(inputs):
            return {CLASSES_NAME: _classes(first)}
        names = picture_tables.class_names(first) if picture_tables.is_parquet(first) else None
        return {} if names is None else {CLASSES_NAME: names}

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """See `SampleKind`."""
        return ImageReader(index, open_shards, store)

    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        """images uint8 (B, height, width, channels); labels, keys int64 (B,); weights float32 (B,)."""
        return {
            "keys": random.integers(0, 2**62, count),
            "images": example_images(config, count, random),
            "weights": np.ones(count, np.float32),
            LABELS: random.integers(0, max(1, vocabulary), count),
        }


class ImageReader(SampleReader):
    """Reads images with their class."""

    is_thread_safe: ClassVar[bool] = True

    def blank(self, count: int) -> Arrays:
        """Zeros: images uint8 (n, height, width, channels); labels int64 (n,); weights float32 (n,)."""
        return {
            "images": black(self._index, count),
            LABELS: np.zeros(count, np.int64),
            "weights": np.zeros(count, np.float32),
        }

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        offset, size, label = row
        arrays["images"][place] = read_image(self._index, descriptor, offset, size, where)
        arrays[LABELS][place] = label


class _ImageScanner(Scanner):
    noun = "image"

    def __init__(self) -> None:
        self._sizes = ImageSizes()
        self._classes = 0

    def add(self, sample: TarSample) -> tuple[int, ...]:
        # Done before the image is opened, so that a sample without a label is reported as such.
        image, label = sample.one(*IMAGE_SUFFIXES), label_member(sample)
        number = decode_label(sample.read(label, MAX_LABEL_BYTES), label.suffix, sample.where)
        self._sizes.add(sample, image)
        self._classes = max(self._classes, number + 1)
        return image.offset, image.size, number

    def result(self, rows: Rows) -> Scan:
        return Scan("images", rows, image=self._sizes.info(self._classes))


class ImageSizes:
    """Checks that all images of a tar have the size of the first one."""

    def __init__(self) -> None:
        self._first: tuple[int, int] | None = None
        self._channels = 1

    def add(self, sample: TarSample, image: Member) -> None:
        """Check one more image.

        Raises:
            UserError: The member is no image, or the image has another size.
        """
        height, width, channels = image_shape(sample.read(image, MAX_IMAGE_BYTES), sample.where)
        if self._first not in (None, (height, width)):
            assert self._first is not None
            raise _other_size(sample.where, (height, width), self._first)
        self._first, self._channels = (height, width), max(self._channels, channels)

    def info(self, classes: int) -> ImageInfo:
        """The entry of an index about these images."""
        assert self._first is not None
        return ImageInfo(*self._first, self._channels, classes=classes)


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class, before it is packed."""

    image: Span | picture_tables.Cell
    label: int
    where: str
    size: tuple[int, int] | None = None
    """Required height and width of the image; None: the image is scaled."""

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return self.image.size

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return (self.image.path,)

    def members(self, means: Means) -> list[PackedMember]:
        """See `Sample`."""
        data = packed_image(self.image, means, self.where, self.size)
        return [data, PackedMember("cls", str(self.label).encode())]


def common_size(scans: Sequence[tuple[Path, Scan]]) -> ImageInfo:
    """The common shape of the images of several tars, and the number of classes in all of them.

    Raises:
        UserError: The images of a tar have another size.
    """
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


def has_caption(sample: TarSample) -> bool:
    """Whether a sample has a caption and no member .cls."""
    return "cls" not in sample.suffixes and bool(sample.suffixes & {*TEXT_MEMBERS, "npy"})


def label_member(sample: TarSample) -> Member:
    """The member that holds the class: `.cls` if there is one, else `.json`.

    Raises:
        UserError: There is no such member, or there are several.
    """
    return sample.one("cls") if "cls" in sample.suffixes else sample.one(*LABEL_SUFFIXES)


def first_size(images: Iterable[Span | picture_tables.Cell], options: PackOptions) -> tuple[int, int] | None:
    """Required height and width of all images: those of the first readable image; None if images are scaled."""
    if options.image_size is not None:
        return None
    for image in images:
        if image.size <= MAX_IMAGE_BYTES:
            # An image that cannot be read is reported when it is packed.
            with contextlib.suppress(UserError):
                return image_shape(image.read(), str(image.path))[:2]
    return None


def packed_image(
    image: Span | picture_tables.Cell, means: Means, where: str, size: tuple[int, int] | None
) -> PackedMember:
    """The member of a shard that holds an image: the unchanged file, or a PNG scaled to the requested size.

    Raises:
        UserError: The file is no image or too large, or the image does not have height and width `size`.
    """
    if image.size > MAX_IMAGE_BYTES:
        raise UserError(f"the image has more than {MAX_IMAGE_BYTES} bytes", where)
    data = image.read()
    if means.image_size is not None:
        return PackedMember("png", squared(data, means.image_size, where))
    found = image_shape(data, where)[:2]
    if size is not None and found != size:
        raise _other_size(where, found, size)
    return PackedMember(image_suffix(data), data)


def images_under(folder: Path, options: PackOptions) -> list[Path]:
    """The PNG and JPEG files below a folder; other files, and hidden ones, are counted in `options.passed`."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file():
            options.passed.ignore(str(path), "a link to a directory, or a broken link")
        elif any(part.startswith(".") for part in path.relative_to(folder).parts):
            options.passed.ignore(str(path), "hidden")
        elif path.suffix.lower()[1:] in IMAGE_SUFFIXES:
            found.append(path)
        elif path.suffix.lower()[1:] not in (*TEXT_MEMBERS, "gz"):
            options.passed.ignore(str(path), "neither PNG nor JPEG")
    return found


def black(index: ShardIndex, count: int) -> np.ndarray:
    """Black images, uint8 of shape (count, height, width, channels)."""
    assert index.image is not None
    return np.zeros((count, index.image.height, index.image.width, index.image.channels), np.uint8)


def read_image(index: ShardIndex, descriptor: int, offset: int, size: int, where: str) -> np.ndarray:
    """Read an image of an open shard, uint8 of shape (height, width, channels)."""
    assert index.image is not None
    return decode_image(read_bytes(descriptor, offset, size, where), index.image, where)


def example_images(config: ModelConfig, count: int, random: np.random.Generator) -> np.ndarray:
    """Random images of the size that a model takes, uint8 of shape (count, height, width, channels)."""
    return random.integers(0, 256, (count, *(config.sample_shape or (32, 32, 3))), dtype=np.uint8)


def image_text(index: ShardIndex) -> str | None:
    """Shape of the images, as HEIGHT x WIDTH x CHANNELS; None if there are no images."""
    image = index.image
    return None if image is None else f"{image.height} x {image.width} x {image.channels}"


def require_same_images(index: ShardIndex, other: ShardIndex) -> None:
    """Refuse images of another shape, or with more classes.

    Raises:
        UserError: The shapes differ, or `other` has more classes.
    """
    assert index.image is not None
    assert other.image is not None
    if image_text(index) != image_text(other) or other.image.classes > index.image.classes:
        raise UserError(
            f"the images ({image_text(other)}, {other.image.classes} classes) differ from the others "
            f"({image_text(index)}, {index.image.classes} classes)",
            where=f"{other.place} and {index.place}",
            fix="Give both directories images of one size, with the classes of the first one.",
        )


def require_same_names(index: ShardIndex, other: ShardIndex, fix: str = "Pack both at once.") -> None:
    """Refuse different names of classes, if both indexes have names. `other` may lack the last classes.

    Raises:
        UserError: The names differ; the error names the first difference.
    """
    names, other_names = index.class_names, other.class_names
    if names and other_names and other_names != names[: len(other_names)]:
        number = next(n for n, name in enumerate(other_names) if n >= len(names) or name != names[n])
        missing = sorted({*other_names} - {*names})
        if missing:
            fix = f"The classes {', '.join(missing[:5])} are not among those of training. {fix}"
        expected = names[number] if number < len(names) else "none"
        raise UserError(
            f"class {number} is '{other_names[number]}' in one directory and '{expected}' in the other",
            where=f"{other.place} and {index.place}",
            fix=fix,
        )


def check_image_size(index: ShardIndex, config: ModelConfig) -> None:
    """Refuse a model that takes images of another size.

    Raises:
        UserError: The sizes of the images and of the model differ.
    """
    assert index.image is not None
    shape = (index.image.height, index.image.width, index.image.channels)
    if config.sample_shape and shape != config.sample_shape:
        raise UserError(
            f"The images are {_by(shape)} (height, width, channels), but the model takes {_by(config.sample_shape)}",
            index.place,
            "Change the sizes under 'model'.",
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _are_files(inputs: Sequence[str | Path]) -> bool:
    return all(Path(one).is_file() for one in inputs)


def _in_folder(inputs: Sequence[str | Path], options: PackOptions) -> list[LabelledImage]:
    if len(inputs) != 1:
        raise UserError("images are packed from one folder with a folder for each class, or from files")
    root = Path(inputs[0])
    classes = _classes(root)
    for path in sorted(root.iterdir()):
        if path.is_file() and path.suffix.lower()[1:] in IMAGE_SUFFIXES:
            options.passed.ignore(str(path), "not in a class folder")
    return [
        LabelledImage(Span.whole(path), label, str(path))
        for label, name in enumerate(classes)
        for path in images_under(root / name, options)
    ]


def _in_files(inputs: Sequence[str | Path], options: PackOptions) -> Sequence[LabelledImage]:
    return [
        one
        for path in map(Path, inputs)
        for one in (_in_table if picture_tables.is_parquet(path) else _in_tar)(path, options)
    ]


def _in_tar(tar: Path, options: PackOptions) -> Iterator[LabelledImage]:
    for sample in samples(tar, options.passed):
        try:
            image, label = sample.one(*IMAGE_SUFFIXES), label_member(sample)
            number = decode_label(sample.read(label, MAX_LABEL_BYTES), label.suffix, sample.where)
        except UserError as error:
            options.passed(error)
            continue
        yield LabelledImage(Span(tar, image.size, image.offset), number, sample.where)


def _in_table(table: Path, options: PackOptions) -> Iterator[LabelledImage]:
    for image, label, where in picture_tables.rows(table):
        try:
            if image is None:
                raise UserError("the row has no image", where)
            number = decode_label(json.dumps(label).encode(), "json", where)
        except UserError as error:
            options.passed(error)
            continue
        yield LabelledImage(image, number, where)


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"no directory at {str(root)!r}")
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _other_size(where: str, found: tuple[int, int], first: tuple[int, int]) -> UserError:
    return UserError(
        f"the image has {found[1]} x {found[0]} pixels, but the first has {first[1]} x {first[0]}",
        where=where,
        fix="`bigtrain data pack --image-size N` scales by the shorter side and crops the centre.",
    )
