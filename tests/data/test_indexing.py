from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.config import StreamingConfig
from bigtrain.data.encoding.learned import train_bpe
from bigtrain.data.formats.documents import documents as documents_in
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.indexing import index_directory, index_urls
from bigtrain.data.inspect import verify
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import FixedOrder
from bigtrain.data.streaming.store import open_index
from bigtrain.data.tokenizers import Tokenizer

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
    with pytest.raises(UserError, match="points outside the tar"):
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
        ([("a.npy", npy([1])), ("b.npy", npy([[1, 2]]))], "2 dimensions"),
        ([("a.npy", npy([1])), ("b.npy", npy([1.0], "<f4"))], "<f4"),
        ([("a.npy", npy([1])), ("b.npy", npy([None], "O"))], "not a list of tokens"),
        ([("a.npy", npy([1, 2])[:-2])], "does not fit"),
        ([("a.npy", b"nothing")], "not a .npy"),
        ([("a.npy", npy([-1], "<i4"))], "-1 is not a token"),
        ([("a.npy", npy([1])), ("b.npy", npy([1], "<i8"))], "<i8"),
        ([("a.npy", npy([]))], "no token"),
        ([("a", b"x")], "no sample"),
        ([("a.txt", b"text")], "text inside tars"),
        ([("a.txt.gz", b"text")], "text inside tars"),
        ([("a.mp", b"text")], "cannot be decoded"),
        ([("a.png", b"x")], "no member .cls"),
        ([("a.png", b"x"), ("a.cls", b"1")], "not a PNG or JPEG image"),
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


@pytest.mark.parametrize("name", ["mpdata.tar", "tendata.tar"])
def test_webdatasets_own_samples_of_other_kinds_are_indexed_by_its_decoders(
    real_data: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes((real_data / "webdataset_samples" / name).read_bytes())
    index = index_directory(tmp_path)
    assert index.samples > 0
    assert index.kind == "decoded"


def test_a_compressed_tar_is_named_as_such(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes((real_data / "webdataset_samples" / "sample.tgz").read_bytes())
    with pytest.raises(UserError, match="gzip"):
        index_directory(tmp_path)


def test_webdatasets_own_sample_of_images_is_read_once_decompressed(real_data: Path, tmp_path: Path) -> None:
    compressed = (real_data / "webdataset_samples" / "sample.tgz").read_bytes()
    (tmp_path / "a.tar").write_bytes(gzip.decompress(compressed))
    index = index_directory(tmp_path)
    assert index.samples == 90
    with Loader(index, FixedOrder(index.sequence_counts(1)), batch_size=90, context=1) as loader:
        (arrays,) = loader.batch(0).micro_batches
    assert arrays["images"].any(axis=(1, 2, 3)).all()
    assert len(set(arrays["labels"].tolist())) == index.vocab_size


def test_a_directory_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar"):
        index_directory(tmp_path)


@pytest.fixture
def bpe(text_tar: Path, tmp_path: Path) -> Tokenizer:
    return train_bpe(documents_in([text_tar / "a.tar"]), 280, tmp_path / "bpe.json")


NOVEL = "It was the best of times, \u00e9 it was the worst of times.\n"


def as_tokens(index: ShardIndex, **reading: Any) -> list[int]:
    """All tokens in the order of the shards."""
    with Loader(index, FixedOrder(index.sequence_counts(8)), batch_size=1, context=8, **reading) as loader:
        steps = range(sum(index.sequence_counts(8)))
        batches = [batch for step in steps for batch in loader.batch(step).micro_batches]
    targets = [batch["targets"][0][batch["weights"][0] > 0] for batch in batches]
    return np.concatenate([batches[0]["tokens"][0][:1], *targets]).tolist()


@pytest.fixture
def text_tar(write_tar: WriteTar) -> Path:
    """Text, gzip of two parts, an empty one, and a member that is not read."""
    double = gzip.compress(b"one ") + gzip.compress(b"two")
    bom = b"\xef\xbb\xbfend"
    return write_tar(
        ("a.txt", NOVEL.encode()), ("a.json", b"{}"), ("b.txt.gz", double), ("c.txt", b""), ("d.txt", bom)
    )  # fmt: skip


def test_text_inside_tars_is_tokenised_when_it_is_read(
    text_tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
    index = index_directory(text_tar, Tokenizer())
    wanted = [*NOVEL.encode(), 256, *b"one two", 256, *b"end", 256]
    assert (index.text, index.samples, index.tokens) == (True, 3, len(wanted))
    assert index.text_bytes == len(wanted) - 3
    assert as_tokens(index) == wanted
    assert load_index(text_tar) == index
    assert verify(text_tar).problems == []
    assert index_directory(text_tar).fingerprint == index.fingerprint
    for made in (tmp_path / "cache").rglob("*.tokens"):
        made.write_bytes(bytes(made.stat().st_size))
    assert as_tokens(index) == wanted


def test_tars_on_a_server_are_indexed_in_one_pass_and_read_as_from_disk(
    text_tar: Path, tmp_path: Path, serve: Any, bpe: Tokenizer
) -> None:
    (text_tar / "b.tar").write_bytes((text_tar / "a.tar").read_bytes())
    streaming = StreamingConfig(cache_dir=str(tmp_path / "cache"))
    with serve(text_tar) as server:
        urls = [f"{server.url}/a.tar", f"{server.url}/b.tar"]
        index = index_urls(urls, tmp_path / "index", bpe)
        assert dict(server.requests) == {"a.tar": 1, "b.tar": 1}
        there = as_tokens(index, streaming=streaming)
        assert server.requests["a.tar"] == 2
        assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
            "a.idx.npy", "b.idx.npy", "index.json", "tokenizer.json",
        ]  # fmt: skip
        with pytest.raises(UserError, match="does not list a directory"):
            index_urls([server.url], tmp_path / "other", bpe)
        with pytest.raises(UserError, match="404"):
            index_urls([f"{server.url}/{{a..b}}.tar"], tmp_path / "other", bpe)
    here = index_directory(text_tar, bpe)
    assert here.fingerprint == index.fingerprint
    assert here.base_url is None
    assert as_tokens(here, streaming=streaming) == there


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\xff", "UTF-8"), (b"a\0b", "binary"), (gzip.compress(b"x" * 9000), "more than 8192"), (b"no gzip", "damaged"),
     (gzip.compress(b"abcdefgh" * 50)[:-9], "cut short")],
    ids=["UTF-8", "binary", "bomb", "not gzip", "cut short"],
)  # fmt: skip
def test_text_that_is_bad_is_named_or_passed_over_and_counted(
    write_tar: WriteTar, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigtrain.data.formats.text.MAX_TEXT_BYTES", 8192)
    suffix = "txt" if message in ("UTF-8", "binary") else "txt.gz"
    directory = write_tar(("a.txt", b"good"), (f"b.{suffix}", data), ("c.txt", b"good too"))
    with pytest.raises(UserError, match=message) as caught:
        index_directory(directory, Tokenizer())
    assert "a.tar" in str(caught.value.where)
    assert "'b'" in str(caught.value.where)
    bad = PassedOver(1)
    index = index_directory(directory, Tokenizer(), passed=bad)
    assert index.samples == 2
    assert len(bad.bad) == 1
    write_tar((f"a.{suffix}", data), (f"b.{suffix}", data), ("c.txt", b"x"))
    with pytest.raises(UserError, match="more than 1"):
        index_directory(directory, Tokenizer(), passed=PassedOver(1))


@pytest.mark.parametrize(("name", "documents"), [("compressed.tar", 3), ("testgz.tar", 1000)])
def test_webdatasets_own_samples_of_text_are_read(
    real_data: Path, tmp_path: Path, name: str, documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes((real_data / "webdataset_samples" / name).read_bytes())
    index = index_directory(tmp_path / "data", Tokenizer())
    assert index.samples == documents
    with Loader(index, FixedOrder(index.sequence_counts(64)), batch_size=2, context=64) as loader:
        assert loader.batch(0).micro_batches[0]["weights"].any()


def test_an_index_from_a_server_may_not_name_another_place(tmp_path: Path, text_tar: Path, serve: Any) -> None:
    with serve(text_tar) as server:
        index_urls([f"{server.url}/a.tar"], tmp_path / "index", Tokenizer())
    with serve(tmp_path / "index") as server, pytest.raises(UserError, match="shards at another location"):
        open_index(server.url, StreamingConfig(cache_dir=str(tmp_path / "cache")))
