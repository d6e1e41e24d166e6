from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.data.encoding.learned import train_bpe
from bigtrain.data.formats.documents import Document
from bigtrain.data.index import load_index
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import CHUNK_CHARACTERS, Tokenizer


@cache
def gpt2(real_data: Path) -> Tokenizer:
    return Tokenizer.open(str(real_data / "tokenizer_gpt2"))


def shakespeare(real_data: Path) -> str:
    return (real_data / "tinyshakespeare" / "input.txt").read_text()


@pytest.fixture
def small_bpe(tmp_path: Path) -> Path:
    text = "the cat sat on the mat. the hat of the cat\n" * 20
    train_bpe([Document("a", tmp_path, text)], 300, tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def test_bytes_round_trip_any_text() -> None:
    tokenizer = Tokenizer.open("bytes")
    text = "héllo → \U0001f600\n\0"
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.dtype.str) == (257, 256, "<u2")
    assert tokenizer.decode([104, 256, 105]) == "hi"


def test_gpt2_files_give_the_published_number_of_tokens(real_data: Path) -> None:
    tokenizer, text = gpt2(real_data), shakespeare(real_data)
    # nanoGPT's data/shakespeare/readme.md: 90 % of the characters, then the rest, without an end of text.
    split = int(len(text) * 0.9)
    assert (len(tokenizer.encode(text[:split])), len(tokenizer.encode(text[split:]))) == (301_966, 36_059)
    # llm.c's tinyshakespeare.py: an end of text before each speech, the first 32,768 tokens for validation.
    speeches = text.replace("\n\n", "\n\n\0").split("\0")
    tokens = sum(1 + len(tokenizer.encode(speech)) for speech in speeches)
    assert tokens == 305_260 + 32_768
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)


def test_encoding_in_pieces_equals_encoding_at_once(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = gpt2(real_data)
    text = shakespeare(real_data)[:100_000] + "\n\n  1234 don't  ΑΒΓ δεζ\r\n" * 50
    whole = tokenizer.encode(text).tolist()
    assert len(text) < CHUNK_CHARACTERS
    monkeypatch.setattr("bigtrain.data.tokenizers.CHUNK_CHARACTERS", 700)
    parts = list(tokenizer.encode_stream([text[:1234], text[1234:]]))
    assert len(parts) > 100
    assert [token for part in parts for token in part.tolist()] == whole


def test_the_name_of_a_special_token_in_a_text_is_text(small_bpe: Path) -> None:
    tokenizer = Tokenizer.open(str(small_bpe))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids.tolist()
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_training_twice_gives_the_same_file(tmp_path: Path, small_bpe: Path) -> None:
    text = "the cat sat on the mat. the hat of the cat\n" * 20
    again = train_bpe([Document("a", tmp_path, text)], 300, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == small_bpe.read_bytes()
    assert again.decode(again.encode("the cät")) == "the cät"
    assert again.vocab_size <= 300
    assert len(again.encode("the cat")) < 7
    assert again.hash == Tokenizer.open(str(small_bpe)).hash


def test_shards_carry_their_tokenizer_and_notice_another(tmp_path: Path, small_bpe: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the hat")
    pack([tmp_path / "text.txt"], tmp_path / "out", Tokenizer.open(str(small_bpe)))
    index = load_index(tmp_path / "out" / "train")
    assert index.load_tokenizer().decode(Tokenizer.open(str(small_bpe)).encode("the hat")) == "the hat"
    definition = json.loads(small_bpe.read_text())
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    definition["model"]["vocab"].popitem()
    (index.directory / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="not the one"):
        index.load_tokenizer()


def test_every_named_file_of_gpt2_is_found(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "tokenizer_gpt2"
    shutil.copy(source / "gpt2_bpe_encoder.json", tmp_path / "vocab.json")
    shutil.copy(source / "gpt2_bpe_vocab.bpe", tmp_path / "merges.txt")
    hashes = {Tokenizer.open(str(path)).hash for path in (source, tmp_path, tmp_path / "merges.txt")}
    assert len(hashes) == 1


@pytest.mark.parametrize(("content", "message"), [("{}", "not a tokenizer"), ("\x00\x01", "not a tokenizer")])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.open(str(tmp_path / "x.json"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.open(str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.open(str(tmp_path / "missing"))


def test_an_end_of_text_that_is_not_there_is_refused(small_bpe: Path) -> None:
    with pytest.raises(UserError, match="<nothing>"):
        Tokenizer.open(str(small_bpe), eot="<nothing>")
