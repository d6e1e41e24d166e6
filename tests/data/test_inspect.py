from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.index import ShardIndex
from bigtrain.data.inspect import inspect, verify
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer


def test_inspect_counts_what_is_there(packed: ShardIndex, texts: list[str]) -> None:
    found = inspect(packed.directory, context=64)
    lengths = [len(text.encode()) + 1 for text in texts]
    assert (found.samples, found.tokens, found.shards) == (40, sum(lengths), len(packed.shards))
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    assert found.sequences * 64 - found.padding == found.tokens - found.shards
    assert found.padding_share == found.padding / (found.sequences * 64)
    assert found.first_lines[0] == texts[0].splitlines()[0][:256]
    json.dumps(found.as_json(), allow_nan=False)


def test_verify_finds_nothing_on_whole_data(tmp_path: Path, corpus: Path) -> None:
    pack([corpus], tmp_path / "out", Tokenizer(), validation="10%", shard_bytes=2048)
    found = verify(tmp_path / "out")
    found.raise_for_problems()
    assert found.problems == []
    assert found.shards > 5


def test_verify_names_every_damaged_shard(packed: ShardIndex) -> None:
    for number in (1, 3):
        path = packed.directory / packed.shards[number].url
        data = bytearray(path.read_bytes())
        data[650] ^= 4
        path.write_bytes(bytes(data))
    (packed.directory / packed.shards[0].url).unlink()
    (packed.directory / "stray.tar").write_bytes(b"x")
    found = verify(packed.directory)
    assert [str(problem["error"]).split()[0] for problem in found.problems] == [
        "shard-000000.tar", "shard-000001.tar", "shard-000003.tar", "stray.tar",
    ]  # fmt: skip
    with pytest.raises(CorruptionError, match="4 problems"):
        found.raise_for_problems()


def test_what_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    for look in (inspect, verify):
        with pytest.raises(UserError, match="no data at"):
            look(tmp_path / "missing")
