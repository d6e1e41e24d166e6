"""Images a second that the loader decodes and augments, by one thread and by one for each core, in turns.

    python -m tests.bench.bench_images [--rounds N] [--out tests/bench/results/bench_images.txt]

Pictures are made on the spot: smooth colours with noise, as JPEG of three sizes, and digits of 28 pixels as PNG, whose
time is mostly the interpreter's. Each round times both in one process, one after the other; the ratio is the median of
the rounds' own.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter
from webdataset import TarWriter

from bigtrain.data.augmentation import AUGMENTATIONS, AugmentationConfig
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.indexing import index_directory
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.threads import own_cores

BATCH, TIMED_S = 64, 2.0
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PHOTOGRAPHS = [{"name": "horizontal_flip"}, {"name": "normalize", "mean": MEAN, "std": STD}]
ROWS: list[tuple[str, int, int, list[dict[str, Any]]]] = [
    ("JPEG, 256 pixels, to 224", 256, 256, [{"name": "random_resized_crop", "size": 224}, *PHOTOGRAPHS]),
    ("JPEG, 128 pixels", 128, 512, [{"name": "random_crop", "padding": 8}, *PHOTOGRAPHS]),
    ("JPEG, 64 pixels", 64, 1024, [{"name": "random_crop", "padding": 4}, *PHOTOGRAPHS]),
    ("PNG, 28 pixels, grey", 28, 2048, [{"name": "random_crop", "padding": 2}]),
]
"""What it is called, pixels of a side, pictures, augmentations."""


def pictures(directory: Path, side: int, count: int) -> ShardIndex:
    """A shard of made-up pictures, indexed."""
    random = np.random.default_rng(side)
    directory.mkdir()
    with TarWriter(str(directory / "pictures.tar")) as tar:
        for number in range(count):
            coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16)
            picture = Image.fromarray((smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8))
            buffer = io.BytesIO()
            suffix = "png" if side < 32 else "jpg"
            (picture.convert("L") if suffix == "png" else picture).save(buffer, "PNG" if suffix == "png" else "JPEG")
            tar.write({"__key__": f"{number:05d}", suffix: buffer.getvalue(), "cls": number % 10})
    index_directory(directory)
    return load_index(directory)


def rate(index: ShardIndex, chain: Sequence[AugmentationConfig], threads: int) -> float:
    """Images a second, from the second batch on."""
    order = SampleOrder(0, index.fingerprint, index.sequence_counts(1), 8)
    how = {"batch_size": BATCH, "context": 1, "streaming": StreamingConfig(threads=threads), "augment": chain}
    with Loader(index, order, **how) as loader:
        loader.batch(0)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < TIMED_S:
            done += 1
            loader.batch(done)
        return done * BATCH / (time.perf_counter() - began)


def main() -> None:
    """Print a line for each kind of picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file that the lines are written to")
    arguments = parser.parse_args()
    cores = own_cores()
    read = TypeAdapter(tuple[Annotated[AugmentationConfig, AUGMENTATIONS], ...]).validate_python
    lines = [f"{'pictures':26}{'1 thread':>12}{f'{cores} threads':>12}{'ratio':>8}   images a second, medians"]
    with tempfile.TemporaryDirectory() as place:
        for name, side, count, entries in ROWS:
            index, chain = pictures(Path(place) / str(side), side, count), read(entries)
            rounds = [(rate(index, chain, 1), rate(index, chain, cores)) for _ in range(arguments.rounds)]
            one, several = (statistics.median(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(b / a for a, b in rounds)
            lines.append(f"{name:26}{one:12,.0f}{several:12,.0f}{ratio:8.2f}")
            print("\n".join(lines[-2:] if len(lines) == 2 else lines[-1:]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
