"""S3 through a real HTTP endpoint: moto's server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import UserError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex
from bigtrain.data.indexing import index_urls
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.streaming.store import open_index
from bigtrain.storage import objects
from bigtrain.storage import scheme as scheme_module
from bigtrain.storage.scheme import open_url


@pytest.fixture
def bucket(packed: ShardIndex, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket that holds the packed shards under data/train."""
    monkeypatch.setattr(objects, "FIRST_BACKOFF_S", 0.01)
    files = {f"/shards/data/train/{path.name}": path.read_bytes() for path in packed.directory.iterdir()}
    s3_server.put({"/shards": b"", **files})
    return "s3://shards/data/train"


def samples(index: ShardIndex, streaming: StreamingConfig | None = None) -> list[Any]:
    order = SampleOrder(7, index.fingerprint, index.sequence_counts(16), 2)
    with Loader(index, order, batch_size=6, context=16, log_samples=True, streaming=streaming) as loader:
        return [
            (batch.sample_ids, batch.micro_batches[0]["targets"].tolist())
            for batch in loader.batches(0, order.sequences_per_epoch // 6)
        ]


@pytest.mark.slow
def test_s3_gives_the_samples_of_the_disk(bucket: str, packed: ShardIndex, tmp_path: Path) -> None:
    streaming = StreamingConfig(cache_dir=str(tmp_path / "cache"), timeout=30)
    index = open_index(bucket, streaming)
    assert index.fingerprint == packed.fingerprint
    assert samples(index, streaming) == samples(packed)
    with pytest.raises(objects.RemoteError, match="no such object"):
        open_index("s3://shards/data/nothing", streaming)
    found = index_urls([bucket], tmp_path / "index")
    assert [shard.hash for shard in found.shards] == [shard.hash for shard in packed.shards]
    assert samples(found, streaming) is not None
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.json"))
    assert b"canary" not in written


def test_a_store_whose_library_is_not_installed_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheme_module.importlib.util, "find_spec", lambda name: None)
    for scheme in ("s3", "gs"):
        with pytest.raises(UserError, match="needs") as caught:
            open_url(f"{scheme}://bucket/x", objects.Patience())
        assert f"pip install -e '.[{scheme}]'" in str(caught.value.fix)
