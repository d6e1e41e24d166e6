"""A scheme of URLs from one file outside bigtrain keeps shards and checkpoints as s3 does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config import UserError
from bigtrain.config.plugin import ACTIVE, load_plugin
from bigtrain.data.config import DataConfig, StreamingConfig
from bigtrain.data.index import load_index
from bigtrain.data.indexing import index_urls
from bigtrain.data.streaming.store import open_index
from bigtrain.storage import read_lines
from bigtrain.storage.objects import Patience, RemoteError
from bigtrain.storage.scheme import SCHEMES, check_url, open_store, open_url

PLUGIN = Path(__file__).parent / "shelf.py"


@pytest.fixture
def plugin() -> Iterator[None]:
    load_plugin(str(PLUGIN))
    yield
    ACTIVE.clear()
    for name in ("shelf", "attic"):
        SCHEMES.found.pop(name)


def test_the_schemes_of_bigtrain_are_files_and_only_some_store() -> None:
    assert SCHEMES.names() == ["gs", "http", "https", "s3"]
    assert check_url("http://host/shards/") == "http://host/shards"
    for url in ("http://host/runs", "https://host/runs"):
        with pytest.raises(ValueError, match="not one of gs, s3"):
            CheckpointConfig(storage=url)
        with pytest.raises(UserError, match="not one of gs, s3"):
            open_store(url, Patience())
    for url in ("pipe:ls", "file:///etc", "shelf://box/runs"):
        with pytest.raises(ValueError, match="not one of gs, http, https, s3"):
            DataConfig(train=url)


@pytest.mark.usefixtures("plugin")
def test_shards_are_read_and_objects_kept_under_a_scheme_of_a_plugin(text_shards: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(text_shards / "train") + "/", "/box/train/", recursive=True)
    streaming = StreamingConfig(cache_dir=str(tmp_path / "cache"))
    url = DataConfig(train="attic://box/train/").train
    assert isinstance(url, str)
    here = load_index(text_shards / "train")
    assert open_index(url, streaming).fingerprint == here.fingerprint
    assert [one.hash for one in index_urls([url], tmp_path / "index").shards] == [one.hash for one in here.shards]
    place = open_store("attic://box/runs", Patience())
    place.put_bytes(b"some bytes", "a/b")
    assert place.sizes("a") == {"b": 10}
    with open_url("attic://box/runs", Patience()).open("a/b", 5) as body:
        assert b"".join(body.chunks) == b"bytes"
    with pytest.raises(RemoteError), open_url("attic://box/runs", Patience()).open("a/c", 0):
        pass
    place.remove(["a/b", "a/c"])
    assert place.sizes("a") == {}


@pytest.mark.slow
def test_a_run_reads_and_saves_under_a_scheme_of_a_plugin_and_resumes_from_it_to_the_bit(
    write_config: Callable[..., Path],
    text_shards: Path,
    tmp_path: Path,
    bigtrain: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shelf, run = tmp_path / "shelf", tmp_path / "runs" / "tiny"
    monkeypatch.setenv("SHELF", str(shelf))
    shutil.copytree(text_shards, shelf / "box" / "data")
    config = write_config(
        data={"train": "shelf://box/data/train", "validation": "shelf://box/data/validation"},
        streaming={"cache_dir": str(tmp_path / "cache"), "log_samples": True},
        checkpoint={"every": "4 steps", "storage": "shelf://box/runs"},
    )
    unknown = bigtrain("train", config)
    assert unknown.returncode == 2
    assert "'shelf' is not one of" in unknown.stderr
    for arguments in (("train", config), ("resume", "shelf://box/runs/tiny@4")):
        done = bigtrain(*arguments, "--plugin", PLUGIN)
        assert done.returncode == 0, done.stderr
        rows = [(row["step"], row["loss"]) for row in read_lines(run / "metrics.jsonl")]
        state = read_tensors(run / "checkpoints", 8, prefix="")
        if arguments[0] == "train":
            first = rows, state
            shutil.rmtree(run)
    assert "resuming after step 4" in done.stderr
    assert rows == first[0]
    assert [name for name, value in state.items() if not torch.equal(value, first[1][name])] == []
    listed = bigtrain("checkpoint", "list", "shelf://box/runs/tiny", "--plugin", PLUGIN, "--json")
    assert [one["step"] for one in json.loads(listed.stdout)["checkpoints"]] == [4, 8]
