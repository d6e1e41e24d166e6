"""A server that answers late, and a loader that reads from it: the part `http` of bench_data.py."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.streaming.store import open_index
from tests.bench.bench_data_readers import BATCH, CONTEXT

CONSUMER_TOKENS_PER_S = 1_000_000
WINDOW = 4
TENTHS = 10


class _Handler(SimpleHTTPRequestHandler):
    """Serves files after a wait, and counts them."""

    def __init__(self, *arguments: Any, latency: float, requests: Counter[str], **named: Any) -> None:
        self.latency, self.requests = latency, requests
        super().__init__(*arguments, **named)

    def do_GET(self) -> None:
        time.sleep(self.latency)
        self.requests[self.path.rpartition("/")[2]] += 1
        super().do_GET()

    def log_message(self, format: str, *values: Any) -> None:
        """Quiet."""


def _serve(place: str, latency: float, pipe: Any) -> None:
    requests: Counter[str] = Counter()
    handler = partial(_Handler, directory=place, latency=latency, requests=requests)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pipe.send(server.server_port)
        while pipe.recv() == "count":
            pipe.send(dict(requests))
            requests.clear()
        server.shutdown()


@contextmanager
def _server(place: Path, latency: float) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    """The URL of a server in a process of its own, and its requests by file name since the last call."""
    context = get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_serve, args=(str(place), latency, child))
    process.start()
    # So that the end of the process ends the waiting for it.
    child.close()

    def count() -> dict[str, int]:
        parent.send("count")
        found: dict[str, int] = parent.recv()
        return found

    try:
        yield f"http://127.0.0.1:{parent.recv()}", count
    finally:
        parent.send("stop")
        process.join()


def over_http(place: Path, index: ShardIndex, latency: float, paced: int) -> dict[str, Any]:
    """One epoch from a server, and a first batch far inside it; see `bench_data`."""
    largest = max(index.stored_bytes(number) for number in range(len(index.shards)))
    cache = max(index.bytes // 10, 3 * WINDOW * largest)
    with _server(index.directory, latency) as (url, count):
        found: dict[str, Any] = {"latency_s": latency, "cache_share": round(cache / index.bytes, 3)}
        streaming = StreamingConfig(cache=cache, cache_dir=str(place / "cache"))
        found |= _epoch(url, streaming, paced)
        requests = count()
        tars = [requests.get(shard.url, 0) for shard in index.shards]
        found["fetches_of_a_shard"] = round(sum(tars) / len(tars), 4)
        cold = streaming.model_copy(update={"cache_dir": str(place / "cold")})
        found["first_batch_at_90_percent_s"] = _first_batch(open_index(url, cold), cold, 0.9)
    found["first_batch_at_90_percent_of_the_disk_s"] = _first_batch(index, streaming, 0.9)
    return found


def _epoch(url: str, streaming: StreamingConfig, paced: int) -> dict[str, Any]:
    """One pass over all data: at the consumer's pace for the first tokens, then as fast as it comes."""
    began = time.perf_counter()
    index = open_index(url, streaming)
    order, steps = _order(index)
    paced_steps = min(steps, max(2, paced // (BATCH * CONTEXT)))
    waited, memory = 0.0, []
    with Loader(index, order, batch_size=BATCH, context=CONTEXT, streaming=streaming) as loader:
        start = first = paced_s = 0.0
        for batch in loader.batches(0, steps):
            done = batch.step + 1
            if not first:
                start = time.perf_counter()
                first = start - began
            elif done <= paced_steps:
                waited += loader.data_wait_s
            if done * TENTHS // steps > batch.step * TENTHS // steps:
                memory.append(anonymous_bytes())
            if done <= paced_steps:
                due = start + done * BATCH * CONTEXT / CONSUMER_TOKENS_PER_S
                time.sleep(max(0.0, due - time.perf_counter()))
                paced_s = time.perf_counter() - start
        seconds = time.perf_counter() - start
    return {
        "first_batch_s": round(first, 3),
        "waiting_share": round(waited / paced_s, 5),
        "paced_tokens": paced_steps * BATCH * CONTEXT,
        "paced_s": round(paced_s, 1),
        "seconds": round(seconds, 1),
        "memory_bytes_at_tenths": memory,
        "memory_growth": round(max(memory) / memory[0] - 1, 4),
    }


def _order(index: ShardIndex) -> tuple[SampleOrder, int]:
    order = SampleOrder(0, index.fingerprint, index.sequence_counts(CONTEXT), WINDOW)
    return order, order.sequences_per_epoch // BATCH


def _first_batch(index: ShardIndex, streaming: StreamingConfig, share: float) -> float:
    """Seconds from an opened index to a batch far inside the data."""
    began = time.perf_counter()
    order, steps = _order(index)
    with Loader(index, order, batch_size=BATCH, context=CONTEXT, streaming=streaming) as loader:
        next(loader.batches(int(share * steps)))
        return round(time.perf_counter() - began, 3)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: mapped shards come and go with the page cache."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say what memory is anonymous")
