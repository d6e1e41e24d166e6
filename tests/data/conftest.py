"""Small shard directories, made by the real packer."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer


def _faulty_server() -> Any:
    # Tests are no package (--import-mode=importlib): a module beside them is loaded by its file.
    spec = importlib.util.spec_from_file_location("faulty_server", Path(__file__).with_name("faulty_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def serve() -> Any:
    """`serve(directory)` is a context manager: a real HTTP server that fails on request."""
    return _faulty_server().serving


@pytest.fixture
def texts() -> list[str]:
    """Forty documents of 1 to some 300 characters, with letters of two and three bytes."""
    random = np.random.default_rng(7)
    letters = list("abcdefgh \néß→")
    return ["".join(random.choice(letters, size=random.integers(1, 300))) for _ in range(40)]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    """The documents as files, whose sorted names keep their order."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number, text in enumerate(texts):
        (directory / f"{number:03d}.txt").write_bytes(text.encode())
    return directory


@pytest.fixture
def packed(tmp_path: Path, corpus: Path) -> ShardIndex:
    """The documents as bytes in several shards."""
    pack([corpus], tmp_path / "packed", Tokenizer(), shard_bytes=2048)
    index = load_index(tmp_path / "packed" / "train")
    assert len(index.shards) > 4
    return index


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tar of PNG and class number with WebDataset's own writer; returns its directory."""

    def write(pixels: np.ndarray, labels: list[int], name: str = "images") -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        with TarWriter(str(directory / "foreign-0.tar")) as tar:
            for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, format="PNG")
                tar.write({"__key__": f"{number:05d}", "png": buffer.getvalue(), "cls": label})
        return directory

    return write


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tar from (name, bytes) pairs or ready TarInfo headers; returns its directory."""

    def write(*entries: tuple[str, bytes] | tarfile.TarInfo) -> Path:
        directory = tmp_path / "tars"
        directory.mkdir(exist_ok=True)
        with tarfile.open(directory / "a.tar", "w:", format=tarfile.USTAR_FORMAT) as tar:
            for entry in entries:
                if isinstance(entry, tarfile.TarInfo):
                    tar.addfile(entry)
                else:
                    info = tarfile.TarInfo(entry[0])
                    info.size = len(entry[1])
                    tar.addfile(info, io.BytesIO(entry[1]))
        return directory

    return write
