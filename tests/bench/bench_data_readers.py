"""One reader of `python -m tests.bench.bench_data`, timed in a process of its own on one core; prints one JSON object.

    python bench_data_readers.py READER DIR --batch B --context C --batches N

READER is bigtrain, webdataset or mosaic. It imports bigtrain only for the first, so that the others run in any
environment that has their library. Each gives int64 batches (B, C + 1) of shuffled, packed tokens; the time runs from
the first batch on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, CONTEXT = 32, 1024
BUFFER = 1024
"""Sequences that webdataset shuffles among."""


def bigtrain_batches(place: Path, batch: int, context: int) -> Iterator[np.ndarray]:
    """Through `bigtrain.data.loader.Loader`."""
    from bigtrain.data.index import load_index
    from bigtrain.data.loader import Loader
    from bigtrain.data.order.sample_order import SampleOrder

    index = load_index(place)
    order = SampleOrder(0, index.fingerprint, index.sequence_counts(context), 8)
    with Loader(index, order, batch_size=batch, context=context) as loader:
        for step in loader.batches():
            (arrays,) = step.micro_batches
            # Its targets are views of the same read: what the others give in one array.
            assert arrays["targets"].shape == (batch, context)
            yield arrays["tokens"]


def webdataset_batches(place: Path, batch: int, context: int) -> Iterator[np.ndarray]:
    """Through webdataset's own pipeline: shards shuffled, documents packed, sequences shuffled in a buffer."""
    import webdataset

    def packed(samples: Iterator[dict[str, Any]]) -> Iterator[np.ndarray]:
        held = np.zeros(0, dtype=np.int64)
        for sample in samples:
            held = np.concatenate([held, sample["npy"].astype(np.int64)])
            count = (len(held) - 1) // context
            for number in range(count):
                yield held[number * context : (number + 1) * context + 1]
            held = held[count * context :]

    shards = sorted(str(path) for path in place.glob("*.tar"))
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(shards, seed=0, deterministic=True),
        webdataset.tarfile_to_samples(),
        webdataset.decode(),
        packed,
        webdataset.shuffle(BUFFER, initial=BUFFER),
        webdataset.batched(batch, collation_fn=np.stack),
    )
    yield from pipeline


def mosaic_batches(place: Path, batch: int, context: int) -> Iterator[np.ndarray]:
    """Through mosaicml-streaming, from sequences that were packed when they were written."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    def collate(samples: list[dict[str, np.ndarray]]) -> np.ndarray:
        return np.stack([sample["tokens"] for sample in samples]).astype(np.int64)

    while True:
        data = StreamingDataset(local=str(place), shuffle=True, batch_size=batch, shuffle_seed=0)
        yield from DataLoader(data, batch_size=batch, collate_fn=collate, drop_last=True)


def write_mosaic(tokens: Path, place: Path, context: int) -> None:
    """Sequences of context + 1 tokens, from one .npy file, as mosaicml-streaming stores them."""
    from streaming import MDSWriter

    stream = np.load(tokens, mmap_mode="r")
    columns = {"tokens": f"ndarray:uint16:{context + 1}"}
    with MDSWriter(out=str(place), columns=columns, size_limit="64mb") as writer:
        for begin in range(0, len(stream) - context, context):
            writer.write({"tokens": np.ascontiguousarray(stream[begin : begin + context + 1])})


READERS = {"bigtrain": bigtrain_batches, "webdataset": webdataset_batches, "mosaic": mosaic_batches}


def main() -> None:
    """Read, and print {"tokens", "seconds", "cpu_s"}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=(*READERS, "write-mosaic"))
    parser.add_argument("place", type=Path)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--tokens", type=Path, help="For write-mosaic: the tokens, as .npy.")
    options = parser.parse_args()
    if options.reader == "write-mosaic":
        write_mosaic(options.tokens, options.place, options.context)
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    batches = READERS[options.reader](options.place, options.batch, options.context)
    next(batches)
    began, cpu = time.perf_counter(), time.process_time()
    tokens = sum(len(one) * options.context for one in itertools.islice(batches, options.batches))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_s": cpu_s}), flush=True)
    # Threads of the libraries may still wait for each other.
    os._exit(0)


if __name__ == "__main__":
    main()
