"""Held-out passages that training text has too."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.data.overlap import PASSAGE, overlap, record

COPIES = 40


def words_of(folder: Path) -> list[list[str]]:
    """The words of each novel, from its first chapter on."""
    return [
        re.findall("[A-Za-z0-9]+", path.read_text(encoding="utf-8-sig"))[2000:] for path in sorted(folder.glob("*.txt"))
    ]


def changed(words: list[str], share: float, chosen: random.Random) -> list[str]:
    return [f"word{chosen.randrange(10**6)}" if chosen.random() < share else word for word in words]


def planted(folder: Path, out: Path, share: float, shift: int) -> tuple[Path, Path, set[int]]:
    """Training text of all novels but the last; held-out text of the last, with passages of the others in places.

    Returns:
        Both files, and the first words of the planted passages.
    """
    chosen = random.Random(1)
    novels = words_of(folder)
    train = [word for novel in novels[:-1] for word in novel]
    held = novels[-1][:20000]
    places = {PASSAGE * number for number in chosen.sample(range(len(held) // PASSAGE - 1), COPIES)}
    for place in places:
        begin = chosen.randrange(len(train) - PASSAGE)
        held[place + shift : place + shift + PASSAGE] = changed(train[begin : begin + PASSAGE], share, chosen)
    (out / "train.txt").write_text(" ".join(train))
    (out / "held.txt").write_text(" ".join(held))
    return out / "train.txt", out / "held.txt", places


@pytest.mark.parametrize(("share", "shift"), [(0.0, 0), (0.1, 0), (0.0, 13)])
def test_planted_copies_are_found_and_nothing_else(real_data: Path, tmp_path: Path, share: float, shift: int) -> None:
    train, held, places = planted(real_data / "gutenberg", tmp_path, share, shift)
    found = overlap(train, held)
    # A shifted copy lies in two passages of the held-out text, and is found by its larger part.
    hits = {one["word"] // PASSAGE for one in found["found"]}
    allowed = {place // PASSAGE + side for place in places for side in ((0, 1) if shift else (0,))}
    assert len(hits & {place // PASSAGE for place in places}) >= 0.95 * len(places)
    assert len(hits - allowed) <= 0.05 * len(hits)
    if share == 0 and shift == 0:
        assert found["exact"] >= 0.95 * COPIES
    if share:
        assert found["exact"] <= 0.1 * COPIES


def test_shards_are_compared_and_keep_the_finding(
    bigtrain: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    chosen = random.Random(0)
    for name in ("a", "b"):
        text = " ".join(f"w{chosen.randrange(5000)}" for _ in range(4000))
        (tmp_path / f"{name}.txt").write_text(text)
    both = (tmp_path / "a.txt").read_text() + " " + (tmp_path / "b.txt").read_text()[:2000]
    (tmp_path / "c.txt").write_text(both)
    for name in ("a", "c"):
        done = bigtrain("data", "pack", tmp_path / f"{name}.txt", "--out", tmp_path / name, "--tokenizer", "bytes")
        assert done.returncode == 0, done.stdout + done.stderr
    done = bigtrain("data", "overlap", tmp_path / "c/train", tmp_path / "a/train", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["share"] > 0.95
    assert json.loads((tmp_path / "a/train/overlap.json").read_text())["passages"] == found["passages"]
    assert overlap(tmp_path / "b.txt", tmp_path / "a.txt")["share"] == 0
    assert record(found, tmp_path) is None


def test_text_too_short_for_a_passage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(UserError, match="nothing to compare"):
        overlap(tmp_path / "a.txt", tmp_path / "a.txt")
