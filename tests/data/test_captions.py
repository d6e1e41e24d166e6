"""Images with captions: indexed where they lie, or packed, and read to the pixel and the token."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.indexing import index_directory
from bigtrain.data.inspect import inspect, verify
from bigtrain.data.kind import kind_named
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import FixedOrder
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.summary import PackSummary
from bigtrain.data.sidecar import write_sidecar
from bigtrain.data.streaming.store import open_index
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.storage import hash_file


def pack_captions(inputs: list[Path], out: Path, tokenizer: Tokenizer, **options: Any) -> PackSummary:
    return kind_named("captions").pack(inputs, out, PackOptions(tokenizer=tokenizer, **options))


CAPTIONS = ["a red square", "blue", "\u00e9t\u00e9 at the sea", "night, of several words and more"]
TOKENS = 16


def pixels(number: int, side: int = 4) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(number: int, side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number, side)).save(buffer, format="PNG")
    return buffer.getvalue()


def pairs() -> list[tuple[str, bytes]]:
    """A caption with white space around it, one as gzip, and metadata that is passed over."""
    texts = [
        f" {CAPTIONS[0]}\n".encode(),
        CAPTIONS[1].encode(),
        CAPTIONS[2].encode(),
        gzip.compress(CAPTIONS[3].encode()),
    ]
    found: list[tuple[str, bytes]] = []
    for number, text in enumerate(texts):
        suffix = "txt.gz" if number == 3 else "txt"
        found += [(f"{number}.png", png(number)), (f"{number}.{suffix}", text), (f"{number}.json", b'{"width": 4}')]
    return found


def batch_of(index: ShardIndex, tokens: int = TOKENS, batch: int = 5, **reading: Any) -> dict[str, np.ndarray]:
    order = FixedOrder(index.sequence_counts(tokens))
    with Loader(index, order, batch_size=batch, context=tokens, micro_size=batch, **reading) as loader:
        return loader.batch(0).micro_batches[0]


def expected(number: int, tokens: int = TOKENS) -> tuple[list[int], list[float]]:
    ids = [*CAPTIONS[number].encode(), 256][:tokens]
    return ids + [0] * (tokens - len(ids)), [1.0] * len(ids) + [0.0] * (tokens - len(ids))


def test_pairs_of_a_foreign_tar_are_indexed_and_read(write_tar: Callable[..., Path]) -> None:
    directory = write_tar(*pairs())
    with pytest.raises(UserError, match="needs a tokenizer"):
        index_directory(directory)
    index = index_directory(directory, Tokenizer())
    assert (index.kind, index.samples, index.vocab_size, index.dtype) == ("captions", 4, 257, "<u2")
    assert index.tokens == sum(len(caption.encode()) + 1 for caption in CAPTIONS)
    batch = batch_of(index)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "images": ("uint8", (5, 4, 4, 3)), "tokens": ("int64", (5, TOKENS)), "weights": ("float32", (5, TOKENS)),
        "keys": ("int64", (5,)),
    }  # fmt: skip
    for number in range(4):
        assert np.array_equal(batch["images"][number], pixels(number))
        assert (batch["tokens"][number].tolist(), batch["weights"][number].tolist()) == expected(number)
    assert not batch["weights"][4].any()
    assert index_directory(directory).fingerprint == index.fingerprint
    assert verify(directory).problems == []
    found = inspect(directory, context=TOKENS)
    assert (found.first_lines, found.cut, found.longest) == (CAPTIONS[:3], 2, 33)
    assert found.padding == (batch["weights"][:4] == 0).sum()


def written(form: str, place: Path) -> Path:
    """The same pairs as a folder, a tar, or JSON lines beside images."""
    place.mkdir()
    if form == "tar":
        with tarfile.open(place / "pairs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in pairs():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return place / "pairs.tar"
    lines = []
    for number, caption in enumerate(CAPTIONS):
        (place / "sub").mkdir(exist_ok=True)
        (place / "sub" / f"{number}.png").write_bytes(png(number))
        if form == "folder":
            (place / "sub" / f"{number}.txt").write_text(caption, encoding="utf-8")
        lines.append(json.dumps({"file_name": f"sub/{number}.png", "title": caption}))
    if form == "folder":
        return place
    (place / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return place / "pairs.jsonl"


@pytest.mark.parametrize("form", ["folder", "tar", "lines"])
def test_packed_pairs_hold_the_tokens_and_are_what_the_tar_holds(
    form: str, tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    pack_captions([written(form, tmp_path / "in")], tmp_path / "out", Tokenizer(), key="title", validation="25%")
    splits = [load_index(tmp_path / "out" / name) for name in ("train", "validation")]
    assert [index.samples for index in splits] == [3, 1]
    assert verify(tmp_path / "out").problems == []
    assert splits[0].bytes_per_token == splits[0].text_bytes / splits[0].tokens  # type: ignore[operator]
    batches = [batch_of(index, batch=index.samples) for index in splits]
    here = batch_of(index_directory(write_tar(*pairs()), Tokenizer()), batch=4)

    def samples(batch: dict[str, np.ndarray]) -> set[bytes]:
        parts = zip(batch["images"], batch["tokens"], batch["weights"], strict=True)
        return {b"".join(array.tobytes() for array in part) for part in parts}

    assert samples(batches[0]) | samples(batches[1]) == samples(here)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a.png", png(0)), ("a.txt", b"x"), ("b.png", png(1))], r"no member \.txt"),
        ([("a.png", png(0)), ("a.txt", b" \n")], "caption is empty"),
        ([("a.png", png(0)), ("a.txt", b"\xff")], "UTF-8"),
        ([("a.png", png(0)), ("a.txt", b"x" * 70_000)], "more than 65536"),
        ([("a.png", png(0)), ("a.txt.gz", gzip.compress(b"x" * 70_000))], "more than 65536"),
        ([("a.png", b"x"), ("a.txt", b"x")], "not a PNG or JPEG image"),
        ([("a.png", png(0)), ("a.txt", b"x"), ("b.png", png(1, side=6)), ("b.txt", b"x")], "6 x 6 pixels"),
    ],
)
def test_pairs_that_are_not_read_are_refused_by_name(
    write_tar: Callable[..., Path], entries: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        index_directory(write_tar(*entries), Tokenizer())
    assert f"a.tar, sample '{entries[-1][0][0]}'" in str(caught.value.where)


def test_lines_name_images_below_their_file_only(tmp_path: Path) -> None:
    file = written("lines", tmp_path / "in")
    (tmp_path / "secret.png").write_bytes(png(9))
    good = file.read_text(encoding="utf-8")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        file.write_text(good + "\n" + json.dumps({"image": name, "title": "x"}), encoding="utf-8")
        with pytest.raises(UserError, match="in the directory of the file") as caught:
            pack_captions([file], tmp_path / "out", Tokenizer(), key="title")
        assert "line 5" in str(caught.value.where)
    file.write_text(good + '\n{"image": "sub/0.png", "title": "\\ud800"}', encoding="utf-8")
    with pytest.raises(UserError, match="no text under 'title'"):
        pack_captions([file], tmp_path / "out", Tokenizer(), key="title")


def test_a_sidecar_that_points_elsewhere_is_found(write_tar: Callable[..., Path]) -> None:
    index = index_directory(write_tar(*pairs()), Tokenizer())
    shard, sound = index.shards[0], index.rows(0)
    for column, value in ((0, 2**62), (3, 2**62), (2, shard.filesize), (3, 1 << 20), (5, 3), (5, 2), (4, 10**6)):
        rows = sound.copy()
        rows[1, column] = value
        write_sidecar(index.directory / shard.index, rows)
        assert hash_file(index.directory / shard.index) != shard.index_hash
        with pytest.raises(CorruptionError, match="does not match its shard"):
            index.rows(0)


@pytest.mark.slow
def test_pairs_on_a_server_are_read_as_from_disk(
    tmp_path: Path, write_tar: Callable[..., Path], serve: Any, real_data: Path
) -> None:
    tokenizer = Tokenizer.open(str(real_data / "tokenizer_gpt2"))
    index = index_directory(write_tar(*pairs()), tokenizer)
    streaming = StreamingConfig(cache_dir=str(tmp_path / "cache"))
    with serve(index.directory) as server:
        there = batch_of(open_index(server.url, streaming), streaming=streaming)
    here = batch_of(index)
    assert all(np.array_equal(there[name], here[name]) for name in here)
    assert tokenizer.decode(here["tokens"][0][:3]).startswith("a red square")
