"""Packing images: a folder for each class becomes shards of images with class numbers (`bigtrain data pack --images`).

Images are mixed once, by a permutation, since a folder holds them class after class. Shards are fixed by the files and
their sizes, so that any number of processes writes the same bytes; after a kill a finished one is not written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, ImageInfo, image_shape, squared
from bigtrain.data.index import Shard
from bigtrain.data.indexing import Scan, check_common, scan_shard, write_common, write_shard
from bigtrain.data.order import permutation
from bigtrain.data.pack import SHARD_BYTES, PackSummary, Progress, SplitSummary, parse_share, publish, workplace
from bigtrain.data.pack_work import Scratch
from bigtrain.data.pack_workers import open_pool
from bigtrain.data.text import BadSamples
from bigtrain.storage import fsync_directory, fsync_file, write_json

CLASSES_NAME = "classes.json"
_SAMPLE_BYTES = 2048


@dataclass(frozen=True)
class LabelledImage:
    """One file and its class."""

    path: Path
    label: int
    bytes: int


@dataclass(frozen=True)
class ImageShard:
    """One shard to be written."""

    split: str
    number: int
    first: int
    images: tuple[LabelledImage, ...]


class ImageWorker:
    """Writes shards of images."""

    def __init__(self, scratch: Scratch, size: int | None, skip_bad: int) -> None:
        self._scratch, self._size, self._skip_bad = scratch, size, skip_bad

    def write(self, shard: ImageShard) -> None:
        """Write one shard and its sidecar."""
        entry = self._scratch.entry(shard.split, shard.number)
        path = self._scratch.shard(shard.split, shard.number)
        if entry.exists():
            return
        bad = BadSamples(self._skip_bad)
        with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for key, image in enumerate(shard.images, shard.first):
                try:
                    data, suffix = self._read(image)
                except UserError as error:
                    bad(error)
                    continue
                for name, content in ((suffix, data), ("cls", str(image.label).encode())):
                    header = tarfile.TarInfo(f"{key:09d}.{name}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
                tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
        fsync_file(path)
        scan = scan_shard(path)
        assert scan.image is not None
        recorded = write_shard(path, scan, path.parent)
        write_json(entry, {"shard": recorded.as_json(), "image": vars(scan.image), "bad": bad.seen})

    def _read(self, image: LabelledImage) -> tuple[bytes, str]:
        if image.bytes > MAX_IMAGE_BYTES:
            raise UserError(f"the image has more than {MAX_IMAGE_BYTES} bytes", str(image.path))
        data = image.path.read_bytes()
        if self._size is not None:
            return squared(data, self._size, str(image.path)), "png"
        image_shape(data, str(image.path))
        return data, "png" if image.path.suffix.lower() == ".png" else "jpg"


def pack_images(
    folder: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    validation: float | str = 0.0,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    skip_bad: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack FOLDER/CLASS/IMAGE.png|jpg into OUT/train, and OUT/validation where `validation` is above zero.

    Classes are numbered by their sorted names, which OUT/train/classes.json lists.

    Args:
        size: Scale and crop all images to squares of this many pixels; None: they have one size already.
        validation: Share of the images to hold out, at least one.
        seed: Another permutation.
        skip_bad: Images of a shard that may be bad, and are passed over.

    Raises:
        UserError: No images, images of several sizes, or what `pack` raises for its output.
    """
    share = parse_share(validation)
    target = Path(out)
    classes, images = _labelled(Path(folder))
    held_out = min(max(1, round(share * len(images))), len(images) - 1) if share else 0
    mixed = [images[number] for number in permutation(len(images), seed)]
    parts = {"train": mixed[held_out:], "validation": mixed[:held_out]}
    shards = [
        shard for split, part in parts.items() for shard in _planned(split, part, shard_bytes, size)
    ]  # fmt: skip
    stamps = [[str(image.path), image.bytes, image.path.stat().st_mtime_ns] for image in images]
    arguments = ["images", size, share, shard_bytes, seed, skip_bad, stamps]
    identity = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()
    with workplace(target, identity) as scratch:
        for split in parts:
            if parts[split]:
                (scratch.root / split).mkdir(exist_ok=True)
        with open_pool(workers, partial(ImageWorker, scratch, size, skip_bad)) as pool:
            under_way: deque[Future[None]] = deque()
            for number, shard in enumerate(shards):
                under_way.append(pool.submit("write", shard))
                while len(under_way) > (0 if number + 1 == len(shards) else pool.ahead):
                    under_way.popleft().result()
                    if progress is not None:
                        progress("packed", number + 1 - len(under_way), len(shards))
        skipped: list[str] = []
        splits = {
            split: _finish(scratch, split, sum(shard.split == split for shard in shards), classes, target, skipped)
            for split in parts
            if parts[split]
        }
        publish(scratch.root, target)
    return PackSummary(str(target), len(classes), "images" if held_out else None, 0, splits, skipped)


def _labelled(folder: Path) -> tuple[list[str], list[LabelledImage]]:
    if not folder.is_dir():
        raise UserError(f"no directory at {str(folder)!r}")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    images = [
        LabelledImage(path, label, path.stat().st_size)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower()[1:] in IMAGE_SUFFIXES and path.is_file()
    ]
    if len(images) < 2:
        raise UserError("there are no images", str(folder), "they are read from FOLDER/CLASS/NAME.png or .jpg")
    return classes, images


def _planned(split: str, images: list[LabelledImage], shard_bytes: int, size: int | None) -> list[ImageShard]:
    shards: list[ImageShard] = []
    begin = used = 0
    for number, image in enumerate(images):
        taken = _SAMPLE_BYTES + (image.bytes if size is None else 3 * size * size)
        if number > begin and used + taken > shard_bytes:
            shards.append(ImageShard(split, len(shards), begin, tuple(images[begin:number])))
            begin, used = number, 0
        used += taken
    if images:
        shards.append(ImageShard(split, len(shards), begin, tuple(images[begin:])))
    return shards


def _finish(
    scratch: Scratch, split: str, count: int, classes: list[str], target: Path, skipped: list[str]
) -> SplitSummary:
    root, none = scratch.root / split, np.zeros((0, 3), dtype=np.int64)
    scans, shards = [], []
    for number in range(count):
        value = json.loads(scratch.entry(split, number).read_bytes())
        scans.append((scratch.shard(split, number), Scan("images", none, image=ImageInfo(**value["image"]))))
        shards.append(Shard(**value["shard"]))
        skipped += value["bad"]
    check_common(scans)
    index = write_common(root, scans, shards, None)
    write_json(root / CLASSES_NAME, classes)
    fsync_directory(root)
    return SplitSummary(str(target / split), index.samples, 0, 0, len(shards), index.bytes, index.fingerprint)
