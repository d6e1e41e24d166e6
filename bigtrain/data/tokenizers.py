"""Tokenizers: one class for bytes, a tokenizer.json, a SentencePiece model, and GPT-2's pair of files.

By default, the characters of a special token inside a document (such as "<|endoftext|>") are encoded as ordinary text,
so that no document can forge the end of another. `encoding.chat` is the exception.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.data.encoding.files import (
    CONFIG_NAME,
    CONVERT,
    END_OF_TEXT_NAMES,
    FILE_NAME,
    GPT2_CLASSES,
    GPT2_PAIRS,
    PIECES_NAME,
    TEMPLATE_NAME,
    config_of,
    content_of,
    gpt2_pair,
    read_companions,
    read_gpt2,
    read_json,
)  # fmt: skip
from bigtrain.data.encoding.rules import BeginOfText, add_mask, begin_of_text, exported_rule
from bigtrain.storage import hash_text, write_atomic, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

Tokens = npt.NDArray[np.int64]

BYTES_VOCAB_SIZE = 257
BYTES_END_OF_TEXT = 256
CHUNK_CHARACTERS = 1 << 20

# A letter, a space or newline, a letter: no common byte-level pre-tokenizer joins the first letter and what follows
# into one word, so a cut between them changes no token.
_SAFE_CUT = re.compile(r"[^\W\d_](?=[ \n][^\W\d_])")


@dataclass(frozen=True)
class TokenizerInfo:
    """The entry of an index about the tokenizer that made its tokens."""

    kind: str
    """"bytes", "tokenizers", or "unknown" for tokens that other tools made."""
    vocab_size: int
    eot: int | None
    """Id of the end-of-text token; None if it is not known."""
    hash: str
    bos: int | None = None
    """Id of the begin-of-text token with which each document begins; None: documents begin without one."""
    special: bool = False
    """Whether the text of a special token in a document becomes that token."""

    def as_json(self) -> dict[str, Any]:
        """The object that an index holds and that `data tokenizer --json` prints, without switches that are off."""
        later = {"bos": self.bos is not None, "special": self.special}
        return {key: value for key, value in asdict(self).items() if later.get(key, True)}

    @property
    def switches(self) -> list[Any]:
        """The settings, apart from the tokenizer itself, that change the tokens of a text; empty if all are off."""
        return [self.bos, self.special] if self.bos is not None or self.special else []


class Definition(NamedTuple):
    """The values from which another process can build the same tokenizer."""

    content: str
    """Content of the tokenizer.json."""
    eot: str | None
    bos: int | None
    special: bool
    companions: dict[str, str]


class Tokenizer:
    """Converts text to token ids and back.

    Args:
        backend: A tokenizer of the `tokenizers` library; None for bytes.
        eot: Name of the end-of-text token; None: it is found among the usual names.
        where: The file of the tokenizer, for error messages.
        companions: The contents of the files in `COMPANIONS` that exist, by file name.
        bos: Whether documents begin with a begin-of-text token.
        special: Whether the text of a special token in a document becomes that token.

    Raises:
        UserError: There is no end-of-text token, or a begin-of-text token is required and there is none.
    """

    def __init__(
        self,
        backend: HuggingFaceTokenizer | None = None,
        eot: str | None = None,
        where: str | None = None,
        companions: dict[str, str] | None = None,
        bos: BeginOfText = "no",
        special: bool = False,
    ) -> None:
        self._backend = backend
        self.companions = companions or {}
        self._chunked = True
        if backend is None:
            self.info = TokenizerInfo("bytes", BYTES_VOCAB_SIZE, BYTES_END_OF_TEXT, "bytes:257")
            return
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not special
        self._definition = backend.to_str(pretty=False)
        self._chunked = _may_be_chunked(json.loads(self._definition), special)
        self.info = TokenizerInfo(
            "tokenizers",
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            eot=_end_of_text(backend, eot, where),
            hash=_hash(self._definition.encode()),
            bos=begin_of_text(backend, self.config, bos, where),
            special=special,
        )

    @classmethod
    def open(
        cls,
        source: str,
        eot: str | None = None,
        bos: BeginOfText = "no",
        chat_template: str | None = None,
        special: bool = False,
    ) -> Tokenizer:
        """The tokenizer that a user names: "bytes", a tokenizer.json, a SentencePiece model, or a directory.

        In a directory, tokenizer.json is used first, then GPT-2's pair of files, then tokenizer.model. The end-of-text
        token is `eot`; else the `eos_token` of the tokenizer_config.json in the same directory; else a usual name.

        Args:
            bos: Whether documents begin with a begin-of-text token.
            chat_template: A Jinja template that replaces the tokenizer's own chat template.
            special: Whether the text of a special token in a document becomes that token.

        Raises:
            UserError: There is no such file, or it is no tokenizer that can be read.
        """
        if source == "bytes":
            if eot is not None or bos == "yes" or chat_template is not None or special:
                raise UserError(
                    "bytes have a fixed end of text, no begin of text and no special tokens for a chat template",
                    fix="Omit --eot, --bos, --chat-template and --special-tokens, or name a tokenizer.json.",
                )
            return cls()
        path = Path(source)
        if not path.exists():
            raise UserError(
                f"no tokenizer at {source!r}",
                fix="Give 'bytes', a tokenizer.json, a SentencePiece .model, or a directory with one or GPT-2's files.",
            )
        directory = path if path.is_dir() else path.parent
        pair = gpt2_pair(directory, None if path.is_dir() else path.name)
        definition = path if path.is_file() and pair is None else directory / FILE_NAME
        companions = read_companions(directory)
        if chat_template is not None:
            companions[TEMPLATE_NAME] = chat_template
        eot = eot or content_of(config_of(companions).get("eos_token"))
        if definition.is_file() and definition.suffix != ".model":
            return cls(read_json(definition), eot, source, companions, bos, special)
        pieces = path if path.is_file() else directory / PIECES_NAME
        if pair is None and pieces.is_file():
            from bigtrain.data.encoding.sentencepiece import read_pieces

            added = config_of(companions).get("added_tokens_decoder")
            return cls(read_pieces(pieces, added), eot, source, companions, bos, special)
        if pair is None:
            raise UserError(
                "the directory holds no tokenizer of a supported format",
                where=source,
                fix=f"Give a directory with {FILE_NAME} ({CONVERT}), {PIECES_NAME}, or one of "
                + ", ".join(" + ".join(names) for names in GPT2_PAIRS),
            )
        kind = config_of(companions).get("tokenizer_class")
        if kind not in GPT2_CLASSES:
            raise UserError(f"vocab.json and merges.txt of a {kind} are not supported by themselves", source, CONVERT)
        return cls(read_gpt2(*pair), eot, source, companions, bos, special)

    @classmethod
    def load(cls, directory: str | Path, info: TokenizerInfo) -> Tokenizer:
        """The tokenizer of a shard directory, compared with the entry in the index.

        Raises:
            UserError: The tokenizer is missing, or it is not the one that the shards were made with.
        """
        if info.kind == "bytes":
            return cls()
        path = Path(directory) / FILE_NAME
        if info.kind == "unknown" or not path.is_file():
            raise UserError("the shards contain no tokenizer", where=str(directory), fix="Pack the text with bigtrain.")
        # The bytes of the file are hashed: another version of the library may write the same tokenizer differently.
        if _hash(path.read_bytes()) != info.hash:
            raise UserError("the tokenizer is not the one that the shards were made with", where=str(path))
        backend = read_json(path)
        eot = None if info.eot is None else backend.id_to_token(info.eot)
        tokenizer = cls(backend, eot, str(path), read_companions(path.parent), special=info.special)
        tokenizer.info = info
        return tokenizer

    def definition(self) -> Definition | None:
        """The values from which `from_definition` builds the same tokenizer in another process; None for bytes."""
        if self._backend is None:
            return None
        return Definition(self._definition, self.token_of(self.eot), self.bos, self.info.special, self.companions)

    @classmethod
    def from_definition(cls, definition: Definition | None) -> Tokenizer:
        """Build a tokenizer from its `definition`."""
        if definition is None:
            return cls()
        from tokenizers import Tokenizer as Backend

        content, eot, _, special, companions = definition
        tokenizer = cls(Backend.from_str(content), eot, companions=companions, special=special)
        tokenizer.info = replace(tokenizer.info, bos=definition.bos)
        return tokenizer

    def token_of(self, id: int) -> str | None:
        """The text of a token, which may be special; None for bytes, or if there is no such token."""
        return None if self._backend is None else self._backend.id_to_token(id)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and its companion files into a shard directory; nothing for bytes."""
        if self._backend is not None:
            write_atomic(Path(directory) / FILE_NAME, self._definition)
            for name, content in self.companions.items():
                write_atomic(Path(directory) / name, content)

    def export(self, directory: str | Path, context: int, mask: int | None = None) -> dict[str, int]:
        """Write the tokenizer for `from_pretrained` of transformers, so that it encodes text as in training.

        The exported tokenizer adds a begin-of-text token if the stored documents have one, whatever its original rule
        was. Special tokens and chat template are those of the original files.

        Args:
            context: Tokens per sequence, for `model_max_length`.
            mask: Id of the mask token of a masked language model. The tokenizer then has this token and keeps its own
                rule for begin-of-text and end-of-text tokens.

        Returns:
            `eos_token_id` and `bos_token_id`, and with a mask `pad_token_id`, for config.json.
        """
        assert self._backend is not None
        place, config, definition = Path(directory), self.config, json.loads(self._definition)
        bos = None if self.bos is None else (str(self.token_of(self.bos)), self.bos)
        if mask is None:
            definition["post_processor"] = exported_rule(definition.get("post_processor"), bos)
        else:
            add_mask(self._backend, definition, config, mask)
        write_atomic(place / FILE_NAME, json.dumps(definition, ensure_ascii=False))
        name = self.token_of(self.eot)
        begin = self.token_of(self.bos) if self.bos is not None else content_of(config.get("bos_token")) or name
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name, "bos_token": begin}
        adds = {"add_bos_token": self.bos is not None, "add_eos_token": False}
        config |= {key: value for key, value in adds.items() if key in config}
        config.setdefault("model_max_length", context)
        config.pop("auto_map", None)
        write_json(place / CONFIG_NAME, config)
        if TEMPLATE_NAME in self.companions:
            write_atomic(place / TEMPLATE_NAME, self.companions[TEMPLATE_NAME])
        id = self._backend.token_to_id(begin) if begin is not None else None
        ids = {"eos_token_id": self.eot, "bos_token_id": self.eot if id is None else id}
        padding = content_of(config.get("pad_token")) if mask is not None else None
        pad = self._backend.token_to_id(padding) if padding is not None else None
        return ids if pad is None else {**ids, "pad_token_id": pad}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.info.vocab_size

    @property
    def eot(self) -> int:
        """Id of the end-of-text token."""
        assert self.info.eot is not None
        return self.info.eot

    @property
    def bos(self) -> int | None:
        """Id of the begin-of-text token with which each document begins; None: documents begin without one."""
        return self.info.bos

    @property
    def config(self) -> dict[str, Any]:
        """The content of the tokenizer's tokenizer_config.json; empty if there is none."""
        return config_of(self.companions)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by their text."""
        if self._backend is None:
            return {}
        found = self._backend.get_added_tokens_decoder()
        return {token.content: id for id, token in found.items() if token.special}

    @cached_property
    def special_strips(self) -> dict[str, tuple[str, str]]:
        """Patterns of the white space before and after each special token that the token absorbs."""
        assert self._backend is not None
        tokens = [token for token in self._backend.get_added_tokens_decoder().values() if token.special]
        return {one.content: (r"\s*" if one.lstrip else "", r"\s*" if one.rstrip else "") for one in tokens}

    @property
    def hash(self) -> str:
        """Hash of the tokenizer's definition."""
        return self.info.hash

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smaller of the types uint16 and uint32, little-endian, that can store all ids."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode(self, text: str) -> Tokens:
        """The ids of a text, int64, without an end-of-text token."""
        parts = list(self.encode_stream([text]))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def encode_stream(self, texts: Iterable[str]) -> Iterator[Tokens]:
        """Yield the ids of one document, given as consecutive pieces of text, in one array or several.

        The ids are those of the full document. A tokenizer that splits text at spaces (byte-level BPE) holds little
        more than CHUNK_CHARACTERS in memory, bytes hold one piece, and all other tokenizers hold the full document.
        """
        if self._backend is None:
            for text in texts:
                yield np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)
            return
        held: list[str] = []
        size = 0
        for text in texts:
            for start in range(0, len(text), CHUNK_CHARACTERS):
                chunk = text[start : start + CHUNK_CHARACTERS]
                cut = _last_safe_cut(chunk) if self._chunked and size + len(chunk) > CHUNK_CHARACTERS else None
                if cut is not None:
                    yield self._encode_piece("".join([*held, chunk[:cut]]))
                    held, size, chunk = [], 0, chunk[cut:]
                held.append(chunk)
                size += len(chunk)
        if held:
            yield self._encode_piece("".join(held))

    def _encode_piece(self, text: str) -> Tokens:
        assert self._backend is not None
        # A batch of one text, because the library can skip the offsets of tokens only for batches.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.int64)

    def encode_with_places(self, text: str, special: bool | None = None) -> tuple[Tokens, Tokens, Tokens]:
        """The ids of a text, the first character of each token, and one past its last character; all int64.

        Args:
            special: Whether the text of a special token becomes that token; None: as in documents.
        """
        if self._backend is None:
            sizes = [len(character.encode()) for character in text]
            places = np.repeat(np.arange(len(text), dtype=np.int64), sizes)
            return self.encode(text), places, places + 1
        self._untrimmed.encode_special_tokens = not (self.info.special if special is None else special)
        encoding = self._untrimmed.encode(text, add_special_tokens=False)
        spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.int64), spans[:, 0], spans[:, 1]

    @cached_property
    def _untrimmed(self) -> HuggingFaceTokenizer:
        """The same tokenizer without a post-processor, so that token offsets include spaces at the ends of tokens."""
        from tokenizers import Tokenizer as Backend

        return Backend.from_str(json.dumps({**json.loads(self._definition), "post_processor": None}))

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of some ids, without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        if self._backend is None:
            of_bytes = values[(values >= 0) & (values < 256)]
            return of_bytes.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        known = values[(values >= 0) & (values < self.vocab_size)].tolist()
        return str(self._backend.decode(known, skip_special_tokens=True))


def same_encoding(tokenizer: Tokenizer, file: Path) -> bool:
    """Whether the definitions of a tokenizer and of a tokenizer.json give the same ids.

    Raises:
        UserError: The file is not a tokenizer.json.
    """
    definition = tokenizer.definition()
    if definition is None:
        return False
    own, other = json.loads(definition.content), json.loads(read_json(file).to_str(pretty=False))
    return all(own.get(key) == other.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens"))


def _last_safe_cut(text: str) -> int | None:
    """The last position at which a cut changes no token of a byte-level tokenizer; None if none was found."""
    window = 4096
    for start in range(max(0, len(text) - window), -window, -window):
        found = list(_SAFE_CUT.finditer(text, max(0, start), start + window + 2))
        if found:
            return found[-1].end()
    return None


def _may_be_chunked(definition: dict[str, Any], special: bool) -> bool:
    """Whether the tokenizer works word by word, so that text may be cut before a space between two words.

    Args:
        special: Whether the text of special tokens becomes these tokens.
    """
    if definition.get("normalizer") is not None:
        return False
    if any(" " in one["content"] for one in definition.get("added_tokens", []) if special or not one["special"]):
        return False
    outer = definition.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    splits = any(step.get("type") == "Split" for step in steps)
    return bool(byte_level) and all(
        not step.get("add_prefix_space", True) and (step.get("use_regex", True) or splits) for step in byte_level
    )


def _hash(definition: bytes) -> str:
    return hash_text(definition)


def _end_of_text(backend: HuggingFaceTokenizer, name: str | None, where: str | None) -> int:
    for candidate in (name,) if name is not None else END_OF_TEXT_NAMES:
        found = backend.token_to_id(candidate)
        if found is not None:
            return int(found)
    wanted = repr(name) if name is not None else " or ".join(END_OF_TEXT_NAMES)
    raise UserError(f"the tokenizer has no end-of-text token {wanted}", where=where, fix="Give it with --eot TOKEN.")
