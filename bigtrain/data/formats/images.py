"""Images and labels as members of a tar: decoders for PNG and JPEG, and for a class number."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import CorruptionError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = ("png", "jpg", "jpeg")
LABEL_SUFFIXES = ("cls", "json")
MAX_IMAGE_BYTES = 1 << 26
MAX_LABEL_BYTES = 1 << 16
MAX_PIXELS = 1 << 26
MAX_CLASSES = 1 << 24
CLASSES_NAME = "classes.json"
"""File with the names of the classes, in the order of their numbers."""

_OTHERS = tuple((re.compile(start, re.DOTALL), what) for start, what in (
    (rb"RIFF....WEBP", "WebP"), (rb"GIF8", "GIF"), (rb"BM", "BMP"), (rb"II\*\0|MM\0\*", "TIFF"),
    (rb"....ftyp(heic|heix|mif1|avif)", "HEIF or AVIF"), (rb"\s*<(!DOCTYPE|html|\?xml|svg)", "HTML or XML"),
))  # fmt: skip
"""First bytes of files of other formats, for error messages."""
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
"""Values of the EXIF orientation that swap height and width."""
_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "RGBA": 3, "LA": 3, "CMYK": 3, "YCbCr": 3}


@dataclass(frozen=True)
class ImageInfo:
    """The shape that all images of a shard directory have, and the number of classes of their labels."""

    height: int
    width: int
    channels: int
    classes: int


def image_shape(data: bytes, where: str) -> tuple[int, int, int]:
    """Height, width and channels (1 for grey, else 3) of an image, from its header, after the EXIF rotation.

    Raises:
        UserError: The data is no PNG or JPEG, or has too many pixels or an unsupported mode such as 16-bit grey.
    """
    with _open(data, where) as image:
        return *_seen_size(image), _CHANNELS[image.mode]


def decode_image(data: bytes, info: ImageInfo, where: str) -> npt.NDArray[np.uint8]:
    """The pixels of an image, uint8 of shape (height, width, channels).

    Raises:
        UserError: The data is no image, or the image has another size than the index says.
    """
    with _open(data, where) as image:
        height, width = _seen_size(image)
        if (height, width) != (info.height, info.width):
            raise UserError(
                f"the image is {width} x {height}; the index says {info.width} x {info.height}", where=where
            )
        try:
            colour = _turned(image).convert("L" if info.channels == 1 else "RGB")
            pixels = np.asarray(colour, dtype=np.uint8)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"the image cannot be decoded: {error}", where=where) from None
    return pixels.reshape(info.height, info.width, info.channels)


def picture_of(pixels: npt.NDArray[np.uint8]) -> Image:
    """Convert pixels of shape (height, width, channels) to a Pillow image.

    Raises:
        ValueError: The pixels are not uint8.
    """
    from PIL import Image

    if pixels.dtype != np.uint8:
        raise ValueError("the image is already normalized: list normalize after the augmentations that work on pixels")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def array_of(picture: Image) -> npt.NDArray[np.uint8]:
    """The inverse of `picture_of`: the pixels as uint8 of shape (height, width, channels)."""
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def image_suffix(data: bytes) -> str:
    """The suffix for the bytes of an image file: png or jpg."""
    return "png" if data.startswith(b"\x89PNG") else "jpg"


def squared(data: bytes, size: int, where: str) -> bytes:
    """Scale an image by its shorter side and crop its centre. Returns a PNG of `size` x `size` pixels.

    Raises:
        UserError: The data is no image.
    """
    with _open(data, where) as image:
        try:
            colour = _turned(image).convert("L" if _CHANNELS[image.mode] == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"the image cannot be decoded: {error}", where=where) from None
    side = min(colour.size)
    left, top = (colour.width - side) // 2, (colour.height - side) // 2
    buffer = io.BytesIO()
    colour.resize((size, size), box=(left, top, left + side, top + side), reducing_gap=3.0).save(buffer, format="PNG")
    return buffer.getvalue()


def _seen_size(image: Image) -> tuple[int, int]:
    """Height and width of an image after its EXIF rotation."""
    return (image.width, image.height) if _orientation(image) in _ON_ITS_SIDE else (image.height, image.width)


def _turned(image: Image) -> Image:
    """The image after its EXIF rotation: cameras store unrotated pixels, and note the rotation in the EXIF data."""
    if _orientation(image) == 1:
        return image
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _orientation(image: Image) -> int:
    # Requesting EXIF data that the header of a PNG does not have would decode the full image.
    if image.format != "JPEG" and "exif" not in image.info:
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def decode_label(data: bytes, suffix: str, where: str) -> int:
    """The class of a sample, from ASCII digits (cls), or from JSON: a number, or an object with `label` or `cls`.

    Raises:
        UserError: The data has another form, or the class is outside 0 .. MAX_CLASSES - 1.
    """
    fix = "Write the class as a whole number, from 0."
    try:
        if suffix == "cls":
            text = data.decode("utf-8").strip()
            value: Any = int(text) if text.isascii() and text.isdigit() else text
        else:
            value = json.loads(data.decode("utf-8"))
            if isinstance(value, dict):
                value = value.get("label", value.get("cls"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the label cannot be read: {error}", where=where, fix=fix) from None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
        raise UserError(f"the label {str(value)[:40]!r} is not a class number", where=where, fix=fix)
    return value


def read_class_names(root: Path) -> tuple[str, ...] | None:
    """The names of the classes that packing has written beside the shards; None if there are none."""
    path = root / CLASSES_NAME
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptionError(f"the names of the classes are damaged: {error}", str(path)) from None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _open(data: bytes, where: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except UnidentifiedImageError:
        # Pillow's own message names a buffer in memory.
        what = next((f" but {what}" for start, what in _OTHERS if start.match(data)), "")
        raise UserError(f"not a PNG or JPEG image{what}", where, "Convert it to PNG or JPEG.") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the member is not a PNG or JPEG image: {error}", where=where) from None
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"the image has more than {MAX_PIXELS} pixels", where=where)
    if image.mode not in _CHANNELS:
        raise UserError(
            f"images of mode {image.mode!r} are not supported", where=where, fix="Store 8-bit grey or RGB images."
        )
    return image
