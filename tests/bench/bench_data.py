"""What reading and packing cost: `python -m tests.bench.bench_data`.

disk: tokens a second of shuffled, packed batches on one core, beside plain webdataset and, where --mosaic names a
    Python that has it, mosaicml-streaming. Each in a process of its own; a round has one of each, in turning order.
http: from a server that answers after --latency, one epoch with a cache of a tenth of the data: the time to the first
    batch; how long a consumer of 1M tokens/s waits for the first --paced tokens, after which it takes what it gets;
    the memory at each tenth; fetches of each shard; and a first batch at 90 %, with an empty cache and from disk.
packing: beside the tokenizer library's own encode_batch on the same documents and cores.
index: of --shards synthetic shards, in memory.

`--only disk` measures one of them. What each must reach is printed with it.

mosaicml-streaming wants packages that have no place beside bigtrain's; `--mosaic PYTHON` is the interpreter of an
environment of its own (python -m venv DIR; DIR/bin/pip install mosaicml-streaming).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.data.encoding.learned import train_bpe
from bigtrain.data.formats.documents import documents as read_documents
from bigtrain.data.index import ShardIndex
from bigtrain.data.indexing import index_directory
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer
from tests.bench import bench_data_readers
from tests.bench.bench_data_http import over_http
from tests.bench.bench_data_readers import BATCH, CONTEXT
from tests.bench.bench_data_report import table, targets

DOCUMENT_TOKENS = 2000
"""On average, of the generated documents."""
VOCABULARY = 2048
PARTS = ("disk", "http", "packing", "index")
READERS = Path(bench_data_readers.__file__)


def main() -> None:
    """Measure, print, and exit 0: whether a target is met is for people to judge."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part; may be given again")
    parser.add_argument("--tokens", type=float, default=1e8, help="generated tokens")
    parser.add_argument("--per-shard", type=float, default=2e6, help="tokens of a shard")
    parser.add_argument("--pairs", type=int, default=9, help="rounds of the readers, and of packing")
    parser.add_argument("--batches", type=int, default=2000, help="batches that a reader reads in a round")
    parser.add_argument("--latency", type=float, default=0.05, help="of the server, in seconds")
    parser.add_argument("--paced", type=float, default=1e8, help="tokens that are taken at 1M a second")
    parser.add_argument("--shards", type=float, default=1e6, help="shards of the synthetic index")
    parser.add_argument("--text-bytes", type=float, default=1e8, help="text to pack")
    parser.add_argument("--mosaic", help="a Python that has mosaicml-streaming")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-data-") as place:
        result = bench(Path(place), options)
    print(json.dumps(result) if options.json else table(result))


def bench(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the requested parts; returns the results and the targets of each as one object."""
    wanted = options.only or PARTS
    result: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "load": round(os.getloadavg()[0], 2),
    }
    if {"disk", "http"} & set(wanted):
        index = generate(place / "shards", int(options.tokens), int(options.per_shard))
        result |= {"tokens": index.tokens, "shards": len(index.shards)}
    if "disk" in wanted:
        result["disk"] = from_disk(place, index, options.pairs, options.batches, options.mosaic)
    if "http" in wanted:
        result["http"] = over_http(place, index, options.latency, int(options.paced))
    if "packing" in wanted:
        result["packing"] = packing(place, int(options.text_bytes), options.pairs)
    if "index" in wanted:
        result["index"] = index_memory(place, int(options.shards))
    return result | {"targets": targets(result)}


def generate(place: Path, tokens: int, per_shard: int) -> ShardIndex:
    """Shards of random tokens, as .npy members, indexed as bytes."""
    from webdataset import TarWriter

    place.mkdir()
    random = np.random.default_rng(0)
    for number in range(max(1, tokens // per_shard)):
        with TarWriter(str(place / f"shard-{number:06d}.tar")) as tar:
            left = per_shard
            while left > 0:
                count = min(left, int(random.integers(1, 2 * DOCUMENT_TOKENS)))
                values = random.integers(0, 256, count).astype(np.uint16)
                tar.write({"__key__": f"{per_shard - left:09d}", "npy": values})
                left -= count
    return index_directory(place, Tokenizer.open("bytes"))


def from_disk(place: Path, index: ShardIndex, pairs: int, batches: int, mosaic: str | None) -> dict[str, Any]:
    """Median tokens/s of each reader, and of the pairs' ratios to the faster of the others."""
    readers = {"bigtrain": (sys.executable, index.directory), "webdataset": (sys.executable, index.directory)}
    if mosaic is not None:
        _write_mosaic(place, index, mosaic)
        readers["mosaic"] = (mosaic, place / "mds")
    rates: dict[str, list[float]] = {name: [] for name in readers}
    by_cpu: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(pairs):
        names = list(readers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            python, data = readers[name]
            arguments = ("--batch", BATCH, "--context", CONTEXT, "--batches", batches)
            found = json.loads(_output(python, str(READERS), name, str(data), *map(str, arguments)))
            rates[name].append(found["tokens"] / found["seconds"])
            by_cpu[name].append(found["tokens"] / found["cpu_s"])
    return {
        "tokens_per_s": {name: round(statistics.median(values)) for name, values in rates.items()},
        "tokens_per_cpu_s": {name: round(statistics.median(values)) for name, values in by_cpu.items()},
        "to_the_faster": _to_the_faster(rates),
        "to_the_faster_by_cpu": _to_the_faster(by_cpu),
        "pairs": pairs,
    }


def _to_the_faster(rates: dict[str, list[float]]) -> float:
    """Median over the rounds of bigtrain's rate over that of the faster of the others."""
    others = [max(values) for values in zip(*(rates[name] for name in rates if name != "bigtrain"), strict=True)]
    return round(statistics.median(mine / best for mine, best in zip(rates["bigtrain"], others, strict=True)), 3)


def _write_mosaic(place: Path, index: ShardIndex, mosaic: str) -> None:
    tokens = place / "tokens.npy"
    reader = SampleOrder(0, index.fingerprint, index.sequence_counts(CONTEXT), 1)
    with Loader(index, reader, batch_size=BATCH, context=CONTEXT) as loader:
        steps = reader.sequences_per_epoch // BATCH
        stream = np.lib.format.open_memmap(tokens, "w+", np.uint16, (steps * BATCH * CONTEXT,))
        for batch in loader.batches(0, steps):
            values = batch.micro_batches[0]["tokens"].reshape(-1)
            stream[batch.step * len(values) : (batch.step + 1) * len(values)] = values
        stream.flush()
    arguments = ("--context", str(CONTEXT), "--tokens", str(tokens))
    _output(mosaic, str(READERS), "write-mosaic", str(place / "mds"), *arguments)
    tokens.unlink()


def _output(python: str, *arguments: str) -> str:
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def packing(place: Path, size: int, pairs: int) -> dict[str, Any]:
    """Packing's bytes of text a second, and over those of the tokenizer library alone."""
    documents = _text(size)
    source = place / "text.jsonl"
    source.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    tokenizer_file = place / "tokenizer.json"
    train_bpe(read_documents([str(source)]), VOCABULARY, tokenizer_file)
    cores = len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(tokenizer_file))
    tokenizer = Tokenizer.open(str(tokenizer_file))
    text_bytes = sum(len(document.encode()) for document in documents)
    ratios, rates = [], []
    for number in range(pairs):
        seconds = {}
        for name in ("pack", "library") if number % 2 else ("library", "pack"):
            began = time.perf_counter()
            if name == "library":
                library.encode_batch_fast(documents, add_special_tokens=False)
            else:
                pack([source], place / f"packed-{number}", tokenizer, workers=cores)
            seconds[name] = time.perf_counter() - began
        ratios.append(seconds["library"] / seconds["pack"])
        rates.append(text_bytes / seconds["pack"])
    return {
        "bytes": text_bytes,
        "bytes_per_s": round(statistics.median(rates)),
        "to_the_library": round(statistics.median(ratios), 3),
        "cores": cores,
    }


def _text(size: int) -> list[str]:
    """Modules of the standard library, in pieces and again and again."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in modules)
    random = np.random.default_rng(0)
    found, left = [], size
    while left > 0:
        length = int(random.integers(200, 8000))
        begin = int(random.integers(0, len(text) - length))
        found.append(text[begin : begin + length])
        left -= length
    return found


def index_memory(place: Path, shards: int) -> dict[str, Any]:
    """Memory and time that an index takes, by its shards; measured in a process of its own."""
    context = get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_measure_index, args=(str(place / "index"), shards, child_end))
    process.start()
    # So that the end of the process ends the waiting for it.
    child_end.close()
    found: dict[str, Any] = parent_end.recv()
    process.join()
    return found


def _measure_index(directory: str, shards: int, pipe: Any) -> None:
    from bigtrain.data.index import write_index
    from bigtrain.data.shard import Shard

    place = Path(directory)
    place.mkdir()
    tokenizer = Tokenizer.open("bytes").info
    entries = [
        Shard(
            url=f"shard-{number:08d}.tar", nsamples=1000, filesize=64 << 20, hash=f"xxh3-128:{number:032x}",
            tokens=32 << 20, index=f"shard-{number:08d}.npy", index_hash=f"xxh3-128:{number:032x}",
        )
        for number in range(shards)
    ]  # fmt: skip
    write_index(place, "tokens", "<u2", tokenizer, None, None, entries)
    del entries
    process = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_data_index", directory, str(CONTEXT)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    pipe.send({"shards": shards, **json.loads(process.stdout)})


if __name__ == "__main__":
    main()
