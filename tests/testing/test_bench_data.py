"""The benchmark of reading and packing, in its smallest form: every part answers, and its table can be read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bigtrain.testing.bench_data import _to_the_faster, bench, table


def test_the_ratio_is_to_the_faster_of_the_others_in_each_round() -> None:
    rates = {"bigtrain": [4.0, 6.0, 9.0], "webdataset": [2.0, 1.0, 1.0], "mosaic": [1.0, 2.0, 3.0]}
    assert _to_the_faster(rates) == 3.0


@pytest.mark.slow
def test_every_part_of_the_benchmark_answers(tmp_path: Path) -> None:
    options = argparse.Namespace(
        tokens=4e5, per_shard=2e4, pairs=1, batches=4, latency=0.05, shards=500, text_bytes=2e5, mosaic=None
    )
    found = bench(tmp_path, options)
    assert found["tokens"] == 400_000
    assert found["http"]["first_batch_s"] > 0.05
    assert found["http"]["fetches_of_a_shard"] >= 1
    assert found["index"]["shards"] == 500
    assert set(found["disk"]["tokens_per_s"]) == {"bigtrain", "webdataset"}
    assert "tokens/s" in table(found)
