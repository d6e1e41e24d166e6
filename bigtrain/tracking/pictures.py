"""Reads the notes of the pictures in RUN/pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from PIL import Image

DESCRIPTION: Final = "Description"
"""Keyword of PNG's text chunk that holds what a picture shows (PNG specification, 11.3.3)."""


def note_of(file: Path) -> str:
    """What a picture shows; empty if the file says nothing, or is no image."""
    try:
        with Image.open(file) as image:
            return str(image.info.get(DESCRIPTION, ""))
    except OSError:
        return ""
