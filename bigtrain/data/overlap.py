"""Finds passages of held-out text that the training text contains too: exact, near and shifted copies.

Texts are compared by hashes of four consecutive words ("shingles"), in lower case and without what separates words.
The held-out text is cut into passages of 50 words, and their shingles are kept in memory. The training text is
streamed, and each of its shingles that the held-out text contains is a match. A passage counts as found if one window
of training text has a sufficient share of its shingles. If a tenth of the words are changed, .9^4 = .66 of the shingles
remain; unrelated English text has a few percent.

MinHash (Broder 1997) estimates the same share from sketches, which pays if both texts are too large for memory. Here
the held-out text is small. An exact count of its shingles is faster than sketches of every window of the training text,
and keeps no training text in memory. The code works with NumPy on large pieces of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.data.formats.documents import documents
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.storage import write_json

FILE = "overlap.json"
"""File with the result, in the directory of the held-out shards."""
KIND = "bigtrain overlap"
PASSAGE = 50
"""Words per passage."""
SHORTEST = 20
"""Minimum number of words in a passage. A shorter end of a document is not compared."""
SHINGLE = 4
NEAR, EXACT = 0.3, 0.97
"""Minimum share of a passage's shingles in one window for a near copy, and for an exact copy."""
COMMON = 16
"""A shingle that occurs more often than this in the held-out passages is too common, and is ignored."""
PIECE = 4 << 20
"""Number of characters that are hashed at once."""
SEQUENCE = 1 << 16
"""Number of tokens of shards that are decoded at once."""
_FILTER_BITS = 24
_SHOWN = 200
Words = npt.NDArray[np.uint64]
_POWERS = np.cumprod(np.full(64, 0x100000001B3, dtype=np.uint64), dtype=np.uint64)
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_LETTERS = np.zeros(256, dtype=np.uint64)
for _byte in range(256):
    if chr(_byte).isascii() and chr(_byte).isalnum():
        _LETTERS[_byte] = ord(chr(_byte).lower())
_LETTERS[128:] = np.arange(128, 256)


@dataclass(frozen=True)
class Passage:
    """A passage of held-out text that the training text contains too."""

    document: str
    word: int
    """Index of the passage's first word in the document."""
    words: int
    train_document: str
    train_word: int
    """Approximate index of the first word in the training document, to within 50 words."""
    share: float
    """Share of the passage's shingles that occur together there."""
    exact: bool


def overlap(train: Path, validation: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Find the passages of `validation` that `train` contains too.

    Args:
        train: Shards of text, or text files as `bigtrain data pack` reads them.
        validation: Shards of text, or text files.
        say: Called with the name of each document of the training text.

    Returns:
        The contents of FILE: numbers and share of exact and near copies, and the first 200 of the passages found.

    Raises:
        UserError: The data is no text, or too short for a passage.
    """
    held = _HeldOut.of(texts_of(validation), str(validation))
    found: dict[int, Passage] = {}
    total = 0
    for name, pieces in texts_of(train):
        say(name)
        for first, hashes in _shingles(pieces):
            total += len(hashes)
            held.look_up(name, first, hashes, found)
    passages = [found[number] for number in sorted(found)]
    exact = sum(one.exact for one in passages)
    by_document: dict[str, int] = {}
    for one in passages:
        by_document[one.document] = by_document.get(one.document, 0) + 1
    return {
        "kind": KIND, "format_version": 1, "train": str(train), "validation": str(validation),
        "fingerprints": {"train": _fingerprint(train), "validation": _fingerprint(validation)},
        "rule": f"{NEAR:.0%} of the {SHINGLE}-word shingles of {PASSAGE} words in one segment; exact from {EXACT:.0%}",
        "passages": len(held.sizes), "exact": exact, "near": len(passages) - exact,
        "share": len(passages) / len(held.sizes), "train_words": total, "documents": by_document,
        "found": [asdict(one) for one in passages[:_SHOWN]],
    }  # fmt: skip


def record(found: dict[str, Any], validation: Path) -> Path | None:
    """Write the result into the directory of the held-out shards; returns None if they are not shards."""
    if not (validation / "index.json").exists():
        return None
    write_json(validation / FILE, found)
    return validation / FILE


def _fingerprint(path: Path) -> str | None:
    return load_index(path).fingerprint if (path / "index.json").exists() else None


def texts_of(path: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield the documents of files, or the shards of packed text: a name, and the text in pieces.

    Raises:
        UserError: The shards hold no text.
    """
    if (path / "index.json").exists():
        yield from _texts_of_shards(load_index(path))
        return
    for document in documents([path]):
        yield document.name, document.pieces()


def _texts_of_shards(index: ShardIndex) -> Iterator[tuple[str, Iterator[str]]]:
    from bigtrain.data.kinds.tokens import TokenReader
    from bigtrain.data.reading import open_reader

    reader = open_reader(index, SEQUENCE)
    if not isinstance(reader, TokenReader) or index.tokenizer is None:
        reader.close()
        raise UserError(
            "Overlap is measured on plain text, but these shards hold none",
            str(index.directory),
            "Give shards or files of plain text.",
        )
    tokenizer = index.load_tokenizer()
    counts = index.sequence_counts(SEQUENCE)

    def pieces(shard: int) -> Iterator[str]:
        for number in range(counts[shard]):
            read = reader.read(np.array([shard]), np.array([number]))
            yield tokenizer.decode(read["tokens"][0][read["weights"][0] > 0])

    try:
        for shard, entry in enumerate(index.shards):
            yield entry.stem, pieces(shard)
    finally:
        reader.close()


@dataclass(frozen=True)
class _HeldOut:
    """The held-out passages, which can be looked up by their shingles."""

    names: list[str]
    """Document of each passage."""
    begins: npt.NDArray[np.int64]
    """First word of each passage in its document, shape (p,)."""
    words: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    """Number of shingles of each passage, shape (p,)."""
    hashes: Words
    """All shingles in ascending order, shape (s,); `passages` holds the passage of each."""
    passages: npt.NDArray[np.int64]
    filter: npt.NDArray[np.bool_]
    """Whether a shingle with these leading bits exists. This filter rules out most shingles of the training text."""

    @classmethod
    def of(cls, texts: Iterator[tuple[str, Iterator[str]]], where: str) -> _HeldOut:
        names: list[str] = []
        begins, words, sizes, parts, owners = [], [], [], [], []
        for name, pieces in texts:
            hashes = np.concatenate([piece for _, piece in _shingles(pieces)] or [np.empty(0, np.uint64)])
            for begin in range(0, len(hashes), PASSAGE):
                own = np.unique(hashes[begin : begin + PASSAGE - SHINGLE + 1])
                if len(hashes) - begin + SHINGLE - 1 < SHORTEST:
                    break
                parts.append(own)
                owners.append(np.full(len(own), len(names)))
                names.append(name)
                begins.append(begin)
                words.append(min(PASSAGE, len(hashes) - begin + SHINGLE - 1))
                sizes.append(len(own))
        if not names:
            raise UserError(f"No document has {SHORTEST} words: there is nothing to compare", where)
        hashes, owner = np.concatenate(parts), np.concatenate(owners)
        order = np.argsort(hashes, kind="stable")
        hashes, owner = hashes[order], owner[order]
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        rare = counts[inverse] <= COMMON
        hashes, owner = hashes[rare], owner[rare]
        known = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)
        known[hashes >> np.uint64(64 - _FILTER_BITS)] = True
        return cls(names, np.array(begins), np.array(words), np.array(sizes), hashes, owner, known)

    def look_up(self, name: str, first: int, hashes: Words, found: dict[int, Passage]) -> None:
        """Add the passages that a piece of training text contains, if it has a larger share of them than before.

        Args:
            name: The training document.
            first: Index of the piece's first word in the document.
            hashes: The shingles of the piece.
            found: The best match so far of each passage, by the passage's number; updated in place.
        """
        place = np.flatnonzero(self.filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        low = np.searchsorted(self.hashes, hashes[place], side="left")
        count = np.searchsorted(self.hashes, hashes[place], side="right") - low
        place, low, count = place[count > 0], low[count > 0], count[count > 0]
        if not len(place):
            return
        # Every held-out passage that has the shingle: the concatenated ranges low .. low + count.
        ends = np.cumsum(count)
        entries = np.arange(ends[-1]) - np.repeat(ends - count, count) + np.repeat(low, count)
        owner, at = self.passages[entries], np.repeat(place + first, count)
        # A shingle counts once per window. Two consecutive windows contain a passage, wherever it begins.
        triples = np.unique(np.column_stack([owner, at // PASSAGE, entries]), axis=0)
        keys, shares = np.unique(triples[:, :2], axis=0, return_counts=True)
        following = np.zeros(len(keys), dtype=np.int64)
        same = (keys[1:, 0] == keys[:-1, 0]) & (keys[1:, 1] == keys[:-1, 1] + 1)
        following[:-1][same] = shares[1:][same]
        share = np.minimum((shares + following) / self.sizes[keys[:, 0]], 1.0)
        for row in np.flatnonzero(share >= NEAR).tolist():
            number = int(keys[row, 0])
            if number not in found or share[row] > found[number].share:
                found[number] = Passage(
                    self.names[number], int(self.begins[number]), int(self.words[number]), name,
                    int(keys[row, 1]) * PASSAGE, float(share[row]), bool(share[row] >= EXACT),
                )  # fmt: skip


def _shingles(pieces: Iterator[str]) -> Iterator[tuple[int, Words]]:
    """Yield the hashes of all sequences of four consecutive words, with the index of the first word.

    Pieces overlap by three words.
    """
    first, carried, rest = 0, np.empty(0, dtype=np.uint64), b""
    for piece in _chunks(pieces):
        data = rest + piece
        # A word that is cut at the end of a piece is hashed with the next piece.
        cut = max(data.rfind(b" "), data.rfind(b"\n")) + 1
        rest = data[cut:]
        words = np.concatenate([carried, _words(data[:cut])])
        if len(words) >= SHINGLE:
            yield first, _joined(words)
            first += len(words) - SHINGLE + 1
            words = words[len(words) - SHINGLE + 1 :]
        carried = words
    words = np.concatenate([carried, _words(rest)])
    if len(words) >= SHINGLE:
        yield first, _joined(words)


def _chunks(pieces: Iterator[str]) -> Iterator[bytes]:
    for piece in pieces:
        for begin in range(0, len(piece), PIECE):
            yield piece[begin : begin + PIECE].encode("utf-8", "surrogatepass")


def _words(data: bytes) -> Words:
    """The hash of each word of a text, in lower case."""
    raw = np.frombuffer(data, dtype=np.uint8)
    letters = _LETTERS[raw]
    # UTF-8's general punctuation (U+2000 to U+203F, E2 80 xx: dashes, quotation marks) is no part of a word.
    marks = np.flatnonzero((raw[:-2] == 0xE2) & (raw[1:-1] == 0x80)) if len(raw) > 2 else np.empty(0, dtype=np.int64)
    for shift in range(3):
        letters[marks + shift] = 0
    inside = letters != 0
    if not inside.any():
        return np.empty(0, dtype=np.uint64)
    starts = np.flatnonzero(inside & ~np.concatenate([[False], inside[:-1]]))
    place = np.flatnonzero(inside)
    number = np.cumsum(np.bincount(starts, minlength=len(letters)))[place] - 1
    depth = np.minimum(place - starts[number], len(_POWERS) - 1)
    heads = np.flatnonzero(np.concatenate([[True], number[1:] != number[:-1]]))
    return _mixed(np.add.reduceat(letters[place] * _POWERS[depth], heads))


def _joined(words: Words) -> Words:
    """The hash of each sequence of four consecutive words."""
    count = len(words) - SHINGLE + 1
    total = np.zeros(count, dtype=np.uint64)
    for shift in range(SHINGLE):
        total = _mixed(total + words[shift : shift + count])
    return total


def _mixed(values: Words) -> Words:
    """SplitMix64's finaliser (Steele et al. 2014)."""
    values = values + _MIX[0]
    values = (values ^ (values >> np.uint64(30))) * _MIX[1]
    values = (values ^ (values >> np.uint64(27))) * _MIX[2]
    return values ^ (values >> np.uint64(31))
