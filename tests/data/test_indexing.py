from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.indexing import index_directory
from bigtrain.data.loader import Loader
from bigtrain.data.order import FixedOrder

WriteTar = Callable[..., Path]


def npy(values: Any, dtype: str = "<u2") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, dtype=dtype), allow_pickle=dtype == "O")
    return buffer.getvalue()


def header(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_tokens_of_a_foreign_tar_are_indexed_and_read(write_tar: WriteTar) -> None:
    directory = write_tar(("a.npy", npy([5, 6, 7], "<i4")), ("b.npy", npy([], "<i4")), ("c.npy", npy([8, 9], "<i4")))
    index = index_directory(directory)
    assert (index.kind, index.dtype, index.tokens, index.vocab_size) == ("tokens", "<i4", 5, 10)
    with Loader(index, FixedOrder(index.sequence_counts(4)), batch_size=1, context=4) as loader:
        batch = loader.batch(0).micro_batches[0]
    assert batch["tokens"].tolist() == [[5, 6, 7, 8]]
    assert batch["targets"].tolist() == [[6, 7, 8, 9]]


def test_images_written_by_webdataset_are_indexed_and_loaded(write_images: Callable[..., Path]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    labels = [3, 0, 1, 9, 2, 2, 5]
    index = index_directory(write_images(pixels, labels))
    assert (index.kind, index.vocab_size, index.samples) == ("images", 10, 7)
    with Loader(index, FixedOrder(index.sequence_counts(1)), batch_size=4, context=1, log_samples=True) as loader:
        batches = [loader.batch(step) for step in range(2)]
    images, read, weights = (
        np.concatenate([batch.micro_batches[0][name] for batch in batches]) for name in ("images", "labels", "weights")
    )
    assert np.array_equal(images[:7], pixels)
    assert read[:7].tolist() == labels
    assert weights.tolist() == [1] * 7 + [0]
    assert batches[1].sample_ids == ["train/foreign-0/4:0", "train/foreign-0/5:0", "train/foreign-0/6:0"]


def test_grey_images_have_one_channel(write_images: Callable[..., Path]) -> None:
    index = index_directory(write_images(np.zeros((2, 4, 4), np.uint8), [0, 1]))
    assert index.image is not None
    assert (index.image.height, index.image.width, index.image.channels) == (4, 4, 1)


def test_images_of_two_sizes_are_refused(write_images: Callable[..., Path], tmp_path: Path) -> None:
    directory = write_images(np.zeros((2, 4, 4), np.uint8), [0, 1])
    (directory / "foreign-0.tar").rename(directory / "first.tar")
    write_images(np.zeros((2, 8, 4), np.uint8), [0, 1])
    with pytest.raises(UserError, match="4 x 8 pixels"):
        index_directory(directory)


@pytest.mark.parametrize("name", ["../a.npy", "x/../../a.npy", "/etc/a.npy"])
def test_a_name_that_leads_out_is_refused_and_nothing_is_written(write_tar: WriteTar, name: str) -> None:
    directory = write_tar((name, npy([1, 2])))
    with pytest.raises(UserError, match="leads out"):
        index_directory(directory)
    assert [path.name for path in directory.parent.iterdir()] == ["tars"]
    assert [path.name for path in directory.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(write_tar: WriteTar, kind: bytes) -> None:
    with pytest.raises(UserError, match="refused"):
        index_directory(write_tar(("a.npy", npy([1, 2])), header("b.npy", kind, "/etc/passwd")))


def test_a_tar_cut_anywhere_is_found(write_tar: WriteTar) -> None:
    directory = write_tar(("a.npy", npy(range(400))), ("b.npy", npy(range(400))))
    path = directory / "a.tar"
    data = path.read_bytes()
    edge = 512 + 1024
    for cut in (edge + 512 + 700, edge, 2 * edge, edge + 100, 2 * edge + 512, 600):
        path.write_bytes(data[:cut])
        with pytest.raises(CorruptionError, match="cut short"):
            index_directory(directory)
    path.write_bytes(data[:200])
    with pytest.raises(CorruptionError, match="damaged"):
        index_directory(directory)
    path.write_bytes(data[: 2 * edge + 1024])
    assert index_directory(directory).tokens == 800


def test_a_damaged_header_in_the_middle_is_found(write_tar: WriteTar) -> None:
    directory = write_tar(("a.npy", npy(range(400))), ("b.npy", npy(range(400))))
    data = bytearray((directory / "a.tar").read_bytes())
    data[512 + 1024 + 150] ^= 0xFF
    (directory / "a.tar").write_bytes(bytes(data))
    with pytest.raises(CorruptionError):
        index_directory(directory)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a.npy", npy([[1, 2]]))], "2 dimensions"),
        ([("a.npy", npy([1.0], "<f4"))], "<f4"),
        ([("a.npy", npy([None], "O"))], "not a list of tokens"),
        ([("a.npy", npy([1, 2])[:-2])], "does not fit"),
        ([("a.npy", b"nothing")], "not a .npy"),
        ([("a.npy", npy([-1], "<i4"))], "-1 is not a token"),
        ([("a.npy", npy([1])), ("b.npy", npy([1], "<i8"))], "<i8"),
        ([("a.npy", npy([]))], "no token"),
        ([("a", b"x")], "no suffix"),
        ([("a.txt", b"text")], "text inside tars"),
        ([("a.txt.gz", b"text")], "text inside tars"),
        ([("a.mp", b"text")], "samples of mp"),
        ([("a.png", b"x")], "no member .cls"),
        ([("a.png", b"x"), ("a.cls", b"1")], "not a PNG"),
        ([("a.npy", npy([1])), ("b.png", b"x")], "no member .npy"),
    ],
)
def test_samples_that_are_not_read_are_refused_by_name(write_tar: WriteTar, entries: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        index_directory(write_tar(*entries))
    assert "a.tar" in str(caught.value.where)


@pytest.mark.parametrize("label", [b"one", b"-1", b"", b"1.5", b"\xff", b"9" * 30])
def test_a_label_that_is_no_class_is_refused(
    write_images: Callable[..., Path], label: bytes, write_tar: WriteTar
) -> None:
    directory = write_images(np.zeros((1, 4, 4), np.uint8), [0])
    with tarfile.open(directory / "foreign-0.tar") as tar:
        png = tar.extractfile("00000.png")
        assert png is not None
        image = png.read()
    with pytest.raises(UserError, match="label"):
        index_directory(write_tar(("a.png", image), ("a.cls", label)))
    with pytest.raises(UserError, match="label"):
        index_directory(write_tar(("a.png", image), ("a.json", b'{"label": "' + label + b'"}')))


def test_json_labels_are_read(write_images: Callable[..., Path], write_tar: WriteTar) -> None:
    directory = write_images(np.zeros((1, 4, 4), np.uint8), [0])
    with tarfile.open(directory / "foreign-0.tar") as tar:
        png = tar.extractfile("00000.png")
        assert png is not None
        image = png.read()
    index = index_directory(
        write_tar(("a.png", image), ("a.json", b'{"label": 4}'), ("b.png", image), ("b.json", b"2"))
    )
    assert index.rows(0)[:, 2].tolist() == [4, 2]


@pytest.mark.parametrize(("name", "message"), [("mpdata.tar", "mp"), ("tendata.tar", "ten")])
def test_webdatasets_own_samples_of_other_kinds_are_refused_clearly(
    real_data: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / name).write_bytes((real_data / "webdataset_samples" / name).read_bytes())
    with pytest.raises(UserError, match=message):
        index_directory(tmp_path)


def test_a_compressed_tar_is_named_as_such(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes((real_data / "webdataset_samples" / "sample.tgz").read_bytes())
    with pytest.raises(UserError, match="gzip"):
        index_directory(tmp_path)


def test_a_directory_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar"):
        index_directory(tmp_path)
