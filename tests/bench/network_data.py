"""The data of `tests.bench.networks`: a function for each data set writes its shards into a directory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.digits import mnist_digits, write_tar
from tests.scenes import scenes, write_arrays

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("BIGTRAIN_TEST_DATA", ROOT.parent / "shared" / "data"))
SHARD = 10_000
"""Digits in a tar."""
AUTHORS = {
    "Austen": ("pride_and_prejudice",), "Dickens": ("a_tale_of_two_cities", "great_expectations"),
    "Eliot": ("middlemarch",), "Joyce": ("ulysses",), "Melville": ("moby_dick",), "Tolstoy": ("war_and_peace",),
}  # fmt: skip
PASSAGE, EACH = 32, 1000
"""Characters of a passage, and passages of an author in each half."""
PASSAGES = EACH * len(AUTHORS)
"""Passages to test with."""


def command(work: Path, *arguments: object) -> None:
    """One command of bigtrain in a directory."""
    words = [sys.executable, "-m", "bigtrain", *map(str, arguments)]
    subprocess.run(words, cwd=work, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr)


def mnist(work: Path) -> None:
    """60,000 digits to train on and 10,000 to test with, as PNG."""
    for split, kind in (("train", "train"), ("validation", "t10k")):
        shards_of(work, work / "shards" / "mnist" / split, *mnist_digits(DATA / "mnist", kind))


def halves(work: Path) -> None:
    """The digits 0 to 4 and the digits 5 to 9 apart, each with classes from 0 to 4."""
    for split, kind in (("train", "train"), ("validation", "t10k")):
        images, labels = mnist_digits(DATA / "mnist", kind)
        for name, first in (("mnist-0-to-4", 0), ("mnist-5-to-9", 5)):
            chosen = (labels >= first) & (labels < first + 5)
            shards_of(work, work / "shards" / name / split, images[chosen], labels[chosen] - first)


def shards_of(work: Path, folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Tars of images with their classes, and their index."""
    for first in range(0, len(images), SHARD):
        part = slice(first, first + SHARD)
        write_tar(folder / f"digits-{first // SHARD}.tar", images[part], labels[part])
    command(work, "data", "index", folder)


def things(work: Path) -> None:
    """10,500 pictures of digits and shapes over one another, of which a twentieth is held out."""
    digits, _ = mnist_digits(DATA / "mnist")
    write_arrays(work / "scenes", *scenes(digits, 10_500))
    command(
        work, "data", "pack", "scenes/image.npy", "scenes/mask.npy", "--arrays", "--validation", "5%", "--out",
        "shards/scenes",
    )  # fmt: skip


def shakespeare(work: Path) -> None:
    """tinyshakespeare by characters; its last tenth is held out."""
    text = DATA / "tinyshakespeare" / "input.txt"
    command(work, "data", "tokenizer", text, "--kind", "characters", "--out", "characters.json")
    command(
        work, "data", "pack", text, "--tokenizer", "characters.json", "--validation", "10%", "--out",
        "shards/shakespeare",
    )  # fmt: skip


def novels(work: Path) -> None:
    """Seven novels as bytes; whole ones are held out."""
    command(
        work, "data", "pack", DATA / "gutenberg", "--tokenizer", "bytes", "--validation", "5%", "--out", "shards/novels"
    )


def authors(work: Path) -> None:
    """Passages of six authors, 1,000 of each to learn from and 1,000 to test with, from other parts of the novels."""
    draw = random.Random(0)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for author, titles in AUTHORS.items():
        text = "".join((DATA / "gutenberg" / f"{title}.txt").read_text() for title in titles)
        half = len(text) // 2
        for split, count, part in (("train", EACH, text[:half]), ("test", EACH, text[half:])):
            begins = [draw.randrange(len(part) - PASSAGE) for _ in range(count)]
            lines[split] += [json.dumps({"text": part[at : at + PASSAGE], "label": author}) for at in begins]
    for split, found in lines.items():
        (work / f"authors-{split}.jsonl").write_text("\n".join(found) + "\n")
        command(
            work, "data", "pack", f"authors-{split}.jsonl", "--kind", "classified", "--tokenizer", "bytes", "--out",
            f"shards/authors-{split}",
        )  # fmt: skip


def addition(work: Path) -> None:
    """5,000 sums of numbers below 100, no pair twice, in either order; a tenth is held out."""
    draw = random.Random(0)
    pairs = draw.sample([(a, b) for a in range(100) for b in range(a, 100)], 5000)
    lines = []
    for pair in pairs:
        a, b = draw.sample(pair, 2)
        lines.append(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}))
    (work / "sums.jsonl").write_text("\n".join(lines) + "\n")
    command(
        work, "data", "pack", "sums.jsonl", "--kind", "supervised", "--tokenizer", "bytes", "--validation", "10%",
        "--out", "shards/addition",
    )  # fmt: skip


def emoji(work: Path) -> None:
    """Emoji and their names, of which two in five are held out."""
    folder = DATA / "emoji_captions"
    command(
        work, "data", "tokenizer", folder / "captions.jsonl", "--key", "text", "--vocab", 1000, "--out", "words.json"
    )
    (tar,) = folder.glob("*.tar")
    command(
        work, "data", "pack", tar, "--captions", "--tokenizer", "words.json", "--image-size", 32, "--validation", "40%",
        "--out", "shards/emoji-words",
    )  # fmt: skip
