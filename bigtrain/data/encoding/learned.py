"""Trains tokenizers on text: byte-level BPE, and one token per character."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from bigtrain.config import UserError
from bigtrain.data.encoding.files import END_OF_TEXT_NAMES
from bigtrain.data.formats.documents import Document
from bigtrain.data.tokenizers import BYTES_VOCAB_SIZE, Tokenizer
from bigtrain.storage import write_atomic

UNKNOWN = "<|unknown|>"
"""Token of all characters that a vocabulary of characters lacks."""
MAX_CHARACTERS = 1 << 16


def train_bpe(documents: Iterable[Document], vocab: int, out: str | Path) -> Tokenizer:
    """Train a byte-level BPE of `vocab` entries (fewer on little text) and write it as tokenizer.json.

    The vocabulary always contains the 256 bytes and <|endoftext|>. The same documents always give the same file.

    Raises:
        UserError: `vocab` is too small, or `out` exists.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab < BYTES_VOCAB_SIZE:
        raise UserError(f"a vocabulary of {vocab} cannot hold all bytes and an end of text", fix="Use at least 257.")
    target = _new_file(out)

    def pieces() -> Iterator[str]:
        for document in documents:
            for text in document.pieces():
                yield from text.splitlines(keepends=True)

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(pieces(), trainer)
    tokenizer = Tokenizer(backend)
    write_atomic(target, backend.to_str(pretty=True))
    return tokenizer


def characters_of(documents: Iterable[Document], out: str | Path) -> Tokenizer:
    """Write a tokenizer.json with one token for each character of the documents, sorted, and <|endoftext|>.

    Characters that do not occur in these documents are encoded as <|unknown|>.

    Raises:
        UserError: The text has more than MAX_CHARACTERS different characters, or `out` exists.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    target = _new_file(out)
    found: set[str] = set()
    for document in documents:
        for text in document.pieces():
            found.update(text)
    if len(found) > MAX_CHARACTERS:
        raise UserError(
            f"the text has {len(found)} different characters, more than {MAX_CHARACTERS}",
            fix="Learn a BPE vocabulary with --kind bpe.",
        )
    vocabulary = {character: number for number, character in enumerate([*sorted(found), UNKNOWN])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([UNKNOWN, END_OF_TEXT_NAMES[0]])
    tokenizer = Tokenizer(backend)
    write_atomic(target, backend.to_str(pretty=True))
    return tokenizer


def _new_file(out: str | Path) -> Path:
    target = Path(out)
    if target.exists():
        raise UserError(f"{str(out)!r} exists already", fix="Choose another file, or delete it.")
    if not target.parent.is_dir():
        raise UserError("the directory of the output does not exist", where=str(target.parent), fix="Create it.")
    return target
