"""Handwritten digits of MNIST as shards."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def mnist_digits(folder: Path, kind: str = "train", count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first images of MNIST's training files (IDX: a header of 16 bytes, of 8 for the labels)."""
    pixels = gzip.decompress((folder / f"{kind}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{kind}-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
    return images[:count], np.frombuffer(labels, np.uint8)[:count]


def write_tar(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """As a user would: WebDataset's own writer, KEY.png and KEY.cls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            writer.write({"__key__": f"{number:06d}", "png": png.getvalue(), "cls": str(label).encode()})
