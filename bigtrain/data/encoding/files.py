"""The files of a tokenizer: a tokenizer.json with its companion files, and GPT-2's pair of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
PIECES_NAME = "tokenizer.model"
"""Name of the file of a SentencePiece model."""
COMPANIONS = (CONFIG_NAME, TEMPLATE_NAME)
"""Companion files of a tokenizer.json: the names of special tokens, and the chat template."""
MAX_COMPANION_BYTES = 1 << 24
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")
"""Classes of transformers whose vocab.json and merges.txt have the meaning of GPT-2's files."""

CONVERT = "Make one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"

GPT2_PAIRS = (
    ("gpt2_bpe_encoder.json", "gpt2_bpe_vocab.bpe"),
    ("encoder.json", "vocab.bpe"),
    ("vocab.json", "merges.txt"),
)


def read_companions(directory: Path) -> dict[str, str]:
    """Read the companion files of a tokenizer.json, by file name.

    Raises:
        UserError: A file is not UTF-8, or tokenizer_config.json is not JSON.
    """
    found = {}
    for name in COMPANIONS:
        path = directory / name
        if path.is_file() and path.stat().st_size <= MAX_COMPANION_BYTES:
            try:
                found[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"the file is not UTF-8: {error.reason}", str(path)) from None
    config_of(found)
    return found


def config_of(companions: dict[str, str]) -> dict[str, Any]:
    """The object in tokenizer_config.json; empty if there is no such file.

    Raises:
        UserError: The file is not JSON.
    """
    try:
        value = json.loads(companions.get(CONFIG_NAME, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{CONFIG_NAME} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def content_of(token: Any) -> str | None:
    """The text of a special token, which transformers writes as a string or as an object."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def gpt2_pair(directory: Path, member: str | None = None) -> tuple[Path, Path] | None:
    for names in GPT2_PAIRS:
        if (member is None or member in names) and all((directory / name).is_file() for name in names):
            return directory / names[0], directory / names[1]
    return None


def read_json(path: Path) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a malformed file
        raise UserError(f"not a tokenizer.json: {error}", where=str(path)) from None


def read_gpt2(encoder: Path, merges: Path) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    try:
        vocabulary = json.loads(encoder.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [
            (left, right) for left, right in map(str.split, lines[1:] if lines[0].startswith("#version") else lines)
        ]
        backend = Backend(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise UserError(f"not GPT-2's tokenizer files: {error}", where=f"{encoder}, {merges}") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT_NAMES[0]])
    return backend
