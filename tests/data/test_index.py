from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.encoding.learned import train_bpe
from bigtrain.data.formats.documents import documents
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.indexing import index_directory
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def edit(index: ShardIndex, **changes: Any) -> None:
    path = index.directory / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_index_is_a_superset_of_wids(packed: ShardIndex, texts: list[str]) -> None:
    value = json.loads((packed.directory / "index.json").read_text())
    assert (value["__kind__"], value["wids_version"], value["format_version"]) == ("wids-shard-index-v1", 1, 1)
    assert {"url", "nsamples", "filesize", "hash", "tokens", "index"} <= set(value["shardlist"][0])
    assert sum(shard["nsamples"] for shard in value["shardlist"]) == len(texts)
    size = sum(len(text.encode()) for text in texts)
    assert (packed.tokens, packed.text_bytes) == (size + len(texts), size)
    assert packed.bytes_per_token == size / (size + len(texts))
    assert value["tokenizer"] == {"kind": "bytes", "vocab_size": 257, "eot": 256, "hash": "bytes:257"}


def test_sequences_of_a_shard_are_its_targets_divided_by_the_context_rounded_up(packed: ShardIndex) -> None:
    for context in (1, 7, 64, 10_000):
        for shard, count in zip(packed.shards, packed.sequence_counts(context), strict=True):
            assert (count - 1) * context < shard.tokens - 1 <= count * context


def test_the_fingerprint_follows_the_data_and_not_its_place(packed: ShardIndex, tmp_path: Path, corpus: Path) -> None:
    shutil.copytree(packed.directory, tmp_path / "elsewhere")
    assert load_index(tmp_path / "elsewhere").fingerprint == packed.fingerprint
    (corpus / "000.txt").write_text("other")
    pack([corpus], tmp_path / "changed", Tokenizer(), shard_bytes=2048)
    assert load_index(tmp_path / "changed" / "train").fingerprint != packed.fingerprint


def test_indexing_again_changes_nothing(packed: ShardIndex) -> None:
    before = {path.name: path.read_bytes() for path in packed.directory.iterdir()}
    index_directory(packed.directory)
    assert {path.name: path.read_bytes() for path in packed.directory.iterdir()} == before


def test_data_changed_under_an_index_is_found_and_named(packed: ShardIndex) -> None:
    packed.check("always")
    flip_bit(packed.directory / packed.shards[2].url, 700)
    packed.check("never")
    for verify in ("auto", "always"):
        with pytest.raises(CorruptionError, match=r"shard-000002\.tar has changed"):
            packed.check(verify)


def test_a_sidecar_that_changed_is_found(packed: ShardIndex) -> None:
    flip_bit(packed.directory / packed.shards[1].index, 128)
    with pytest.raises(CorruptionError, match=r"shard-000001.idx.npy has changed"):
        packed.check()
    flip_bit(packed.directory / packed.shards[1].index, 130)
    with pytest.raises(CorruptionError, match="does not match its shard"):
        packed.rows(1)


def test_sizes_are_compared_even_where_hashes_are_not(packed: ShardIndex) -> None:
    path = packed.directory / packed.shards[0].url
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(CorruptionError, match="but the index says"):
        packed.check("never")


def test_a_missing_shard_is_the_users_mistake(packed: ShardIndex) -> None:
    (packed.directory / packed.shards[1].url).unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar is missing") as caught:
        packed.check("never")
    assert caught.value.exit_code == 2


def test_a_newer_format_is_refused(packed: ShardIndex) -> None:
    edit(packed, format_version=5)
    with pytest.raises(UserError, match="format 5"):
        load_index(packed.directory)


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", "pipe:cat", "..", "a/b.tar"])
def test_an_index_cannot_point_outside_its_directory(packed: ShardIndex, name: str) -> None:
    shards = [shard.as_json() for shard in packed.shards]
    shards[0]["url"] = name
    edit(packed, shardlist=shards)
    with pytest.raises(CorruptionError, match="plain file name"):
        load_index(packed.directory)


A_SHARD = {
    "url": "a.tar", "nsamples": 0, "filesize": 0, "hash": "", "tokens": 0, "index": "a.npy", "index_hash": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "pairs"},
        {"dtype": "<f4"},
        {"tokenizer": None},
        {"tokenizer": {}},
        {"tokenizer": {"kind": "bytes", "vocab_size": 257, "eot": 256, "hash": A_SHARD}},
        {"tokenizer": {"kind": "bytes", "vocab_size": "257", "eot": 256, "hash": "bytes:257"}},
        {"fingerprint": "x"},
        {"shardlist": 1},
    ],
)
def test_an_index_that_contradicts_itself_is_refused(packed: ShardIndex, changes: dict[str, Any]) -> None:
    edit(packed, **changes)
    with pytest.raises(CorruptionError, match="index"):
        load_index(packed.directory)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_a_damaged_index_is_refused(packed: ShardIndex, data: bytes) -> None:
    (packed.directory / "index.json").write_bytes(data)
    with pytest.raises(CorruptionError, match="damaged"):
        load_index(packed.directory)
    with pytest.raises(UserError, match="which records the tokenizer, is damaged"):
        index_directory(packed.directory)


def test_a_pickle_in_place_of_a_sidecar_is_not_executed(packed: ShardIndex, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "trapped",)

    np.save(packed.directory / packed.shards[0].index, np.asarray([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptionError, match="damaged"):
        packed.rows(0)
    assert not (tmp_path / "trapped").exists()


def test_a_path_without_an_index_says_what_to_do(packed: ShardIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data at"):
        load_index(tmp_path / "missing")
    with pytest.raises(UserError, match=r"no index\.json") as caught:
        load_index(packed.directory.parent)
    assert str(packed.directory.parent / "train") in str(caught.value.fix)
    (packed.directory / "index.json").unlink()
    with pytest.raises(UserError) as caught:
        load_index(packed.directory)
    assert "data index" in str(caught.value.fix)


def test_validation_of_another_tokenizer_or_kind_is_refused(
    packed: ShardIndex, tmp_path: Path, corpus: Path, write_images: Callable[..., Path]
) -> None:
    packed.require_same_tokens(packed)
    train_bpe(documents([corpus]), 280, tmp_path / "tokenizer.json")
    pack([corpus], tmp_path / "bpe", Tokenizer.open(str(tmp_path / "tokenizer.json")))
    with pytest.raises(UserError, match="tokenizers"):
        packed.require_same_tokens(load_index(tmp_path / "bpe" / "train"))
    images = index_directory(write_images(np.zeros((2, 4, 4), np.uint8), [0, 1]))
    with pytest.raises(UserError, match="images"):
        packed.require_same_tokens(images)
    more = index_directory(write_images(np.zeros((2, 4, 4), np.uint8), [0, 2], name="more"))
    more.require_same_tokens(images)
    with pytest.raises(UserError, match="3 classes"):
        images.require_same_tokens(more)
