"""Draws a picture as PNG."""

from __future__ import annotations

import io
import textwrap

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from bigtrain.models.pictures import Picture
from bigtrain.tracking.pictures import DESCRIPTION

SIDE, CAPTIONED_SIDE = 56, 128
"""Minimum pixels of an image's shorter side, without and with captions; images are enlarged by integer factors."""
GAP = 4
LINE = 13
CHARACTERS = 20
"""Maximum characters per line of a caption."""
LINES = 4
GROUND, INK = 255, (70, 70, 70)


def png(picture: Picture) -> bytes:
    """The bytes of a PNG file that shows the images of a picture in rows, each above its caption.

    The picture's note is the file's description.
    """
    images = _bytes(picture)
    count, height, width = images.shape[:3]
    columns = max(1, min(picture.columns, count))
    wanted = CAPTIONED_SIDE if picture.captions else SIDE
    factor = max(1, -(-wanted // min(height, width)))
    height, width = height * factor, width * factor
    captions = [
        textwrap.wrap(caption, CHARACTERS, max_lines=LINES, placeholder="...") for caption in picture.captions[:count]
    ]
    text = max(map(len, captions)) * LINE + GAP if captions else 0
    rows = -(-count // columns)
    size = columns * (width + GAP) + GAP, rows * (height + text + GAP) + GAP
    sheet = Image.new("RGB", size, (GROUND,) * 3)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left, top = GAP + column * (width + GAP), GAP + row * (height + text + GAP)
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        if number < len(captions):
            draw.multiline_text((left, top + height + 2), "\n".join(captions[number]), INK, font, spacing=2)
    out = io.BytesIO()
    described = PngInfo()
    described.add_itxt(DESCRIPTION, picture.note)
    sheet.save(out, "PNG", pnginfo=described if picture.note else None)
    return out.getvalue()


def _bytes(picture: Picture) -> npt.NDArray[np.uint8]:
    """The images of a picture as uint8 of shape (N, height, width, 3)."""
    images = picture.images.detach().float().clamp(0, 1).mul(255).round().cpu().numpy().astype(np.uint8)
    images = images.transpose(0, 2, 3, 1)
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images[..., :3]
