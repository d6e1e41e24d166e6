"""SentencePiece models, tokenizers of characters, and the begin of text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from bigtrain.config import UserError
from bigtrain.data.encoding.forms import encode_record
from bigtrain.data.encoding.learned import characters_of
from bigtrain.data.formats.documents import documents
from bigtrain.data.index import load_index
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer
from tests.data.test_inputs import stored

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.", "It was the best of times, it was the worst of times.",
    "Call me Ishmael. Some years ago, never mind how long precisely.", "Über 12 fields  of   grass\tand ﬁre",
    " begins and ends with spaces ", "one\ntwo", "",
]  # fmt: skip
OTHER = ["A fox of times, 3 × naïve → ☃!", "mind the 世界", "  x  "]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    ("rule", "collapses", "has_prefix"),
    [("nmt_nfkc", True, True), ("identity", False, True), ("identity", False, False)],
    ids=["like T5", "like Llama 2", "like Gemma"],
)
def test_a_sentencepiece_model_gives_the_librarys_ids(
    kind: str, rule: str, collapses: bool, has_prefix: bool, tmp_path: Path
) -> None:
    library: Any = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=written, model_type=kind, vocab_size=330,
        byte_fallback=True, normalization_rule_name=rule, hard_vocab_limit=False, minloglevel=2,
        remove_extra_whitespaces=collapses, add_dummy_prefix=has_prefix,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    processor = library.SentencePieceProcessor(model_proto=written.getvalue())
    for source in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = Tokenizer.open(str(source))
        assert (tokenizer.eot, tokenizer.vocab_size) == (processor.eos_id(), processor.vocab_size())
        for text in [*SENTENCES, *OTHER]:
            assert tokenizer.encode(text).tolist() == processor.encode(text), text
            assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text))
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.open(str(tmp_path))


def test_a_tokenizer_of_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be,\nor nöt 🙂")
    made = characters_of(documents([tmp_path / "a.txt"]), tmp_path / "t.json")
    tokenizer = Tokenizer.open(str(tmp_path / "t.json"))
    assert tokenizer.vocab_size == made.vocab_size == len(set("to be,\nor nöt 🙂")) + 2
    assert tokenizer.decode(tokenizer.encode("nöt 🙂,\n")) == "nöt 🙂,\n"
    assert len(tokenizer.encode("ot be")) == 5
    unknown = tokenizer.encode("toz")
    assert tokenizer.token_of(int(unknown[2])) == "<|unknown|>"
    with pytest.raises(UserError, match="exists already"):
        characters_of(documents([tmp_path / "a.txt"]), tmp_path / "t.json")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tokenizer of bytes whose own rule begins a text with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({symbol: place for place, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    place = tmp_path / "tokenizer"
    place.mkdir()
    backend.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return place


def test_documents_begin_with_a_begin_of_text_where_it_is_switched_on(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": ""}\n{"text": "c"}\n')
    plain = Tokenizer.open(str(directory))
    a, b, c = (int(id) for id in plain.encode("abc"))
    assert Tokenizer.open(str(directory), bos="rule").bos == Tokenizer.open(str(directory), bos="yes").bos == 256
    pack([tmp_path / "a.jsonl"], tmp_path / "plain", plain)
    pack([tmp_path / "a.jsonl"], tmp_path / "out", Tokenizer.open(str(directory), bos="rule"))
    assert stored(tmp_path / "plain" / "train") == [a, b, 257, c, 257]
    assert stored(tmp_path / "out" / "train") == [256, a, b, 257, 256, c, 257]
    one, other = (load_index(tmp_path / name / "train") for name in ("plain", "out"))
    assert (one.load_tokenizer().bos, other.load_tokenizer().bos) == (None, 256)
    assert one.fingerprint != other.fingerprint
    versions = [json.loads((index.directory / "index.json").read_text())["format_version"] for index in (one, other)]
    assert versions == [1, 4]
    sample = encode_record({"prompt": "a", "completion": "b"}, other.load_tokenizer(), {})
    assert sample.ids.tolist() == [256, a, b, 257]
    for index, begins in ((one, False), (other, True)):
        out = tmp_path / f"export-{begins}"
        out.mkdir()
        index.load_tokenizer().export(out, 64)
        processor: Any = transformers.AutoTokenizer.from_pretrained(out)
        assert processor("ab")["input_ids"] == ([256] if begins else []) + [a, b]


def test_a_rule_that_adds_nothing_begins_nothing(directory: Path) -> None:
    definition = json.loads((directory / "tokenizer.json").read_text()) | {"post_processor": None}
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    assert Tokenizer.open(str(directory), bos="rule").bos is None
    assert Tokenizer.open(str(directory), bos="yes").bos == 256
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no begin-of-text token"):
        Tokenizer.open(str(directory), bos="yes")
    with pytest.raises(UserError, match="no begin of text"):
        Tokenizer.open("bytes", bos="yes")


def test_places_of_tokens_are_those_of_their_characters(directory: Path) -> None:
    tokenizer = Tokenizer.open(str(directory))
    for one in (tokenizer, Tokenizer()):
        ids, begins, ends = one.encode_with_places("aé b")
        assert ids.tolist() == one.encode("aé b").tolist()
        assert (begins.tolist(), ends.tolist()) == ([0, 1, 1, 2, 3], [1, 2, 2, 3, 4])
    assert tokenizer.encode_with_places("a</s>", special=True)[0].tolist()[1:] == [257]
    assert len(tokenizer.encode_with_places("a</s>")[0]) == 5
    assert np.asarray(tokenizer.encode("a</s>")).size == 5


def test_special_tokens_in_text_are_tokens_where_it_is_switched_on(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a</s>b"}')
    plain, special = Tokenizer.open(str(directory)), Tokenizer.open(str(directory), special=True)
    assert len(plain.encode("a</s>b")) == 6
    assert special.encode("a</s>b").tolist()[1] == 257 == special.encode_with_places("a</s>b")[0][1]
    found = {}
    for name, tokenizer in (("plain", plain), ("special", special)):
        pack([tmp_path / "a.jsonl"], tmp_path / name, tokenizer)
        index = load_index(tmp_path / name / "train")
        found[name] = index.fingerprint, len(stored(index.directory)), index.load_tokenizer().encode("</s>").size
    assert found["plain"][1:] == (7, 4)
    assert found["special"][1:] == (4, 1)
    assert found["plain"][0] != found["special"][0]
    with pytest.raises(UserError, match="no special tokens"):
        Tokenizer.open("bytes", special=True)
