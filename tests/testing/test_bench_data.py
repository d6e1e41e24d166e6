"""The benchmark of reading and packing, in its smallest form: every part answers, and its table can be read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.bench.bench_data import _to_the_faster, bench
from tests.bench.bench_data_report import table, targets


def test_the_ratio_is_to_the_faster_of_the_others_in_each_round() -> None:
    rates = {"bigtrain": [4.0, 6.0, 9.0], "webdataset": [2.0, 1.0, 1.0], "mosaic": [1.0, 2.0, 3.0]}
    assert _to_the_faster(rates) == 3.0


@pytest.mark.slow
def test_every_part_of_the_benchmark_answers(tmp_path: Path) -> None:
    options = argparse.Namespace(
        tokens=4e5, per_shard=2e4, pairs=1, batches=4, latency=0.05, shards=500, text_bytes=2e5, mosaic=None,
        only=None, paced=1e5,
    )  # fmt: skip
    found = bench(tmp_path, options)
    assert found["tokens"] == 400_000
    assert found["http"]["first_batch_s"] > 0.05
    assert found["http"]["fetches_of_a_shard"] >= 1
    assert found["index"]["shards"] == 500
    assert set(found["disk"]["tokens_per_s"]) == {"bigtrain", "webdataset"}
    assert found["http"]["paced_tokens"] < 100_000
    assert len(found["http"]["memory_bytes_at_tenths"]) == 10
    assert len(found["targets"]) == 8
    assert "tokens/s" in table(found)


def test_a_missed_target_is_reported() -> None:
    packed = {"bytes": 1, "bytes_per_s": 1, "to_the_library": 0.5, "cores": 2}
    index = {"shards": 10, "memory_bytes": 5000, "seconds": 1.0}
    result = {"device": "a", "load": 0.0, "packing": packed, "index": index}
    result["targets"] = targets(result)
    assert [one["met"] for one in targets(result)] == [False, True]
    assert "NOT MET  packing" in table(result)
    assert "at least 0.8" in table(result)
