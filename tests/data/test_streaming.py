"""Data behind servers that fail gives the samples that it gives from disk, or a clear error."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.streaming.store import check_remote, open_index, shards_at_once
from bigtrain.storage import objects

CONTEXT, BATCH, WINDOW = 16, 6, 2


def _load_server() -> Any:
    # Tests are no package (--import-mode=importlib): the server is loaded by its file.
    spec = importlib.util.spec_from_file_location("faulty_server", Path(__file__).with_name("faulty_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faulty_server"] = module
    spec.loader.exec_module(module)
    return module


faults = _load_server()


@pytest.fixture
def server(packed: ShardIndex) -> Iterator[Any]:
    with faults.serving(packed.directory) as running:
        yield running


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_BACKOFF_S", 0.01)


@pytest.fixture
def streaming(tmp_path: Path) -> StreamingConfig:
    return StreamingConfig(cache_dir=str(tmp_path / "cache"), cache="1 MB", timeout=10, retries=3)


def samples(index: ShardIndex, streaming: StreamingConfig | None = None, steps: int = 30, first: int = 0) -> list[Any]:
    order = SampleOrder(7, index.fingerprint, index.sequence_counts(CONTEXT), WINDOW)
    with Loader(
        index, order, batch_size=BATCH, context=CONTEXT, log_samples=True, streaming=streaming
    ) as loader:  # fmt: skip
        return [
            (batch.sample_ids, {name: values.tolist() for name, values in batch.micro_batches[0].items()})
            for batch in loader.batches(first, first + steps)
        ]


def reserved(part: Path) -> int:
    """Bytes that the cache keeps free for a file that is under way."""
    return int(part.name.rpartition("-")[2])


def epoch(index: ShardIndex) -> int:
    """Whole steps of an epoch."""
    return sum(index.sequence_counts(CONTEXT)) // BATCH


ONE_FAULT = {
    "500 twice": [faults.status(500), faults.status(500)],
    "503": [faults.status(503)],
    "truncation": [faults.truncated, faults.truncated, faults.truncated],
    "reset": [faults.reset, faults.reset],
    "stall": [faults.stall(3.0)],
    "wrong length": [faults.wrong_length, faults.wrong_length],
    "no length": [faults.no_length],
    "no ranges": [faults.no_range_truncated, faults.no_range],
    "other bytes once": [faults.other_bytes],
}


@pytest.mark.parametrize("kind", list(ONE_FAULT))
def test_a_server_that_fails_gives_the_samples_of_the_disk(
    server: Any, packed: ShardIndex, streaming: StreamingConfig, kind: str
) -> None:
    server.faults = {"*.tar": ONE_FAULT[kind], "index.json": ONE_FAULT[kind][:2] if "length" not in kind else []}
    if kind == "stall":
        streaming = streaming.model_copy(update={"timeout": 1.0, "retries": 8})
        server.faults = {packed.shards[0].url: ONE_FAULT[kind]}
    if kind == "other bytes once":
        server.faults.pop("index.json")
    index = open_index(server.url, streaming)
    assert index.fingerprint == packed.fingerprint
    assert samples(index, streaming, epoch(packed)) == samples(packed, None, epoch(packed))
    assert all(count == 1 for name, count in server.requests.items() if name.endswith(".npy"))


def test_what_arrived_before_a_break_is_not_fetched_again(
    server: Any, packed: ShardIndex, streaming: StreamingConfig
) -> None:
    server.faults = {"*.tar": [faults.truncated]}
    index = open_index(server.url, streaming)
    assert samples(index, streaming, epoch(packed)) == samples(packed, None, epoch(packed))
    for shard in index.shards:
        assert server.bytes_sent[shard.url] == shard.filesize
        assert server.ranges[shard.url] == [0, shard.filesize // 2]


def test_each_shard_is_fetched_once_an_epoch_into_a_cache_of_the_shards_in_use(
    server: Any, packed: ShardIndex, streaming: StreamingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = open_index(server.url, streaming)
    stored = [index.stored_bytes(number) for number in range(len(index.shards))]
    # What a run is asked for: a batch may lie in two windows, while a third is fetched.
    needed = max(stored) * shards_at_once(index.sequence_counts(CONTEXT), WINDOW, BATCH)
    assert sum(stored) > 2 * needed
    small = streaming.model_copy(update={"cache": needed})
    with caplog.at_level(logging.WARNING):
        assert samples(index, small, epoch(packed)) == samples(packed, None, epoch(packed))
    assert "over its limit" not in caplog.text
    fetched = sum(count for name, count in server.requests.items() if name.endswith(".tar"))
    # The window after the last step's belongs to the next epoch.
    assert fetched <= len(index.shards) + WINDOW
    # A fetch that the end of the run has cancelled stays for the next run, and counts as what it was to be.
    held = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".npy")]
    parts = list((tmp_path / "cache").rglob(".*.part-*"))
    assert len(held) > WINDOW
    assert sum(path.stat().st_size for path in held) + sum(reserved(part) for part in parts) <= small.cache
    # What went through the cache left nothing behind: the window of the next epoch is all that can be under way.
    assert len(parts) <= 2 * WINDOW


def test_a_second_run_finds_all_in_the_cache_and_asks_the_server_only_for_the_index(
    server: Any, packed: ShardIndex, streaming: StreamingConfig
) -> None:
    steps = epoch(packed)
    first = samples(open_index(server.url, streaming), streaming, steps)
    server.requests.clear()
    index = open_index(server.url, streaming)
    assert samples(index, streaming, steps) == first
    assert dict(server.requests) == {"index.json": 1}
    pinned = open_index(server.url, streaming, pinned=[index.fingerprint])
    assert samples(pinned, streaming, steps) == first
    assert dict(server.requests) == {"index.json": 1}


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(
    server: Any, packed: ShardIndex, streaming: StreamingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = open_index(server.url, streaming)
    samples(index, streaming)
    for path in (tmp_path / "cache").rglob("shard-*.tar"):
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        assert samples(index, streaming) == samples(packed)
    assert "damaged" in caplog.text


def test_a_cache_that_is_removed_while_it_is_read_is_filled_again(
    server: Any, packed: ShardIndex, streaming: StreamingConfig, tmp_path: Path
) -> None:
    index, steps, removed = open_index(server.url, streaming), 2 * epoch(packed), 0
    order = SampleOrder(7, index.fingerprint, index.sequence_counts(CONTEXT), WINDOW)
    found = []
    with Loader(index, order, batch_size=BATCH, context=CONTEXT, log_samples=True, streaming=streaming) as loader:
        for batch in loader.batches(0, steps):
            found.append((batch.sample_ids, {name: values.tolist() for name, values in batch.micro_batches[0].items()}))
            if batch.step % 3 == 0:
                removed += (tmp_path / "cache").exists()
                shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert removed > 3
    assert found == samples(packed, steps=steps)


def test_a_shard_with_other_bytes_than_its_index_ends_in_an_error_that_names_it(
    server: Any, packed: ShardIndex, streaming: StreamingConfig
) -> None:
    server.faults = {packed.shards[0].url: [faults.other_bytes] * 20}
    index = open_index(server.url, streaming)
    with pytest.raises(CorruptionError, match=r"downloaded 3 times, .* differ from its index") as caught:
        samples(index, streaming, 100)
    assert caught.value.where == f"{server.url}/{packed.shards[0].url}"
    assert server.requests[packed.shards[0].url] == 3


@pytest.mark.parametrize("code", [404, 403, 410])
def test_a_missing_shard_is_not_requested_again(
    server: Any, packed: ShardIndex, streaming: StreamingConfig, code: int
) -> None:
    server.faults = {packed.shards[0].url: [faults.status(code)] * 20}
    index = open_index(server.url, streaming)
    with pytest.raises(objects.RemoteError, match=str(code)):
        samples(index, streaming, 100)
    assert server.requests[packed.shards[0].url] == 1
    with pytest.raises(objects.RemoteError, match=str(code)):
        check_remote([(index, WINDOW)], streaming)


def test_patience_ends(server: Any, packed: ShardIndex, streaming: StreamingConfig) -> None:
    server.faults = {packed.shards[0].url: [faults.no_range_truncated] * 50}
    index = open_index(server.url, streaming)
    with pytest.raises(objects.RemoteError, match="4 failures in a row"):
        samples(index, streaming, 100)


def test_data_that_changed_since_the_run_began_is_refused(
    server: Any, packed: ShardIndex, streaming: StreamingConfig
) -> None:
    with pytest.raises(UserError, match="has changed"):
        open_index(server.url, streaming, pinned=["sha256:" + "0" * 64])


def test_a_cache_too_small_for_two_windows_is_refused_with_the_size_that_would_do(
    server: Any, packed: ShardIndex, streaming: StreamingConfig
) -> None:
    index = open_index(server.url, streaming)
    small = streaming.model_copy(update={"cache": 5000})
    shards = shards_at_once(index.sequence_counts(CONTEXT), WINDOW, BATCH)
    assert shards == 3 * WINDOW
    with pytest.raises(UserError, match="in use at once") as caught:
        check_remote([(index, shards)], small)
    size = int(str(caught.value.fix).split()[3])
    check_remote([(index, shards)], small.model_copy(update={"cache": size}))


def test_redirects_stay_on_http(server: Any, packed: ShardIndex, streaming: StreamingConfig, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    for place in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/x", "pipe:cat"):
        server.faults = {"index.json": [faults.redirected(place)] * 9}
        server.requests.clear()
        with pytest.raises(UserError):
            open_index(server.url, streaming)
    server.faults = {"index.json": [faults.redirected(f"{server.url}/tokenizer.json")]}
    server.requests.clear()
    with pytest.raises(UserError, match="404"):
        open_index(server.url, streaming)


def test_closing_does_not_wait_for_a_server_that_is_silent(
    server: Any, packed: ShardIndex, streaming: StreamingConfig
) -> None:
    index = open_index(server.url, streaming)
    server.always = faults.stall(1.0)
    patient = streaming.model_copy(update={"retries": 1000, "timeout": 1})
    order = SampleOrder(7, index.fingerprint, index.sequence_counts(CONTEXT), WINDOW)
    loader = Loader(index, order, batch_size=BATCH, context=CONTEXT, streaming=patient)
    loader.batches()
    time.sleep(0.1)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bigtrain-fetch")]


READER = """
import sys
from bigtrain.data.config import StreamingConfig
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.streaming.store import open_index
url, cache, size, first, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
streaming = StreamingConfig(cache_dir=cache, cache=size, timeout=2)
index = open_index(url, streaming)
order = SampleOrder(7, index.fingerprint, index.sequence_counts(16), 2)
with Loader(index, order, batch_size=6, context=16, log_samples=True, streaming=streaming) as loader:
    for batch in loader.batches(first, first + steps):
        print(batch.sample_ids, batch.micro_batches[0]["tokens"].sum(), flush=True)
"""


def reader(server: Any, cache: Path, size: int, first: int, steps: int) -> subprocess.Popen[str]:
    arguments = [server.url, cache, size, first, steps]
    return subprocess.Popen(
        [sys.executable, "-c", READER, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=os.environ
    )


def expected_lines(packed: ShardIndex, first: int, steps: int) -> str:
    found = samples(packed, None, steps, first)
    return "".join(f"{ids} {np.sum(arrays['tokens'])}\n" for ids, arrays in found)


def test_processes_share_a_cache_and_fetch_each_shard_once(server: Any, packed: ShardIndex, tmp_path: Path) -> None:
    server.delay_s = 0.05
    steps = epoch(packed)
    running = [reader(server, tmp_path / "cache", 10**6, 0, steps) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in running] == [expected_lines(packed, 0, steps)] * 2
    assert {count for name, count in server.requests.items() if name.endswith(".tar")} == {1}


@pytest.mark.slow
def test_readers_killed_in_the_middle_of_a_fetch_leave_a_cache_that_is_gone_on_with(
    server: Any, packed: ShardIndex, tmp_path: Path
) -> None:
    server.faults = {"*.tar": [faults.truncated] * 3}
    server.delay_s = 0.1
    size = sum(sorted((packed.stored_bytes(n) for n in range(len(packed.shards))), reverse=True)[: 2 * WINDOW + 1])
    for pause_s in (0.0, 0.1, 0.3):
        process = reader(server, tmp_path / "cache", size, 0, 40)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = reader(server, tmp_path / "cache", size, 0, 40)
    assert process.communicate(timeout=60)[0] == expected_lines(packed, 0, 40)
    held = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".npy")]
    assert sum(path.stat().st_size for path in held) <= size


def test_a_shard_in_use_is_never_evicted(tmp_path: Path) -> None:
    from bigtrain.data.streaming.cache import Cache, NoRoom

    cache = Cache(tmp_path / "cache", 250)
    place = cache.directory("source", "fingerprint")
    get: Callable[..., Any] = lambda name, urgent=False: cache.get(  # noqa: E731
        place / name, size=100, hash=None, fill=lambda file: file.write(b"x" * 100) and None, urgent=urgent
    )
    first, second = get("a"), get("b")
    with pytest.raises(NoRoom):
        get("c")
    third = get("c", urgent=True)
    assert {path.name for path in place.glob("?")} == {"a", "b", "c"}
    second.release()
    third.release()
    get("d").release()
    assert {path.name for path in place.glob("?")} == {"a", "d"}
    first.release()
