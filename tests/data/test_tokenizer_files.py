"""What lies beside a tokenizer.json belongs to it, on the way to an export too: end of text, BOS, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from bigtrain.config import UserError
from bigtrain.data.index import load_index
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer, same_encoding

TEXT = "the quick brown fox jumps over the lazy dog " * 20
TEMPLATE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face tokenizer directory: its rules put <|begin|> before a text, which training does not."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|endoftext|>"]
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    backend.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]),
    ])  # fmt: skip
    place = tmp_path / "tokenizer"
    place.mkdir()
    backend.save(str(place / "tokenizer.json"))
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "add_bos_token": True}
    (place / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (place / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (place / "merges.txt").write_text("#version: 0.2\na b\n")
    return place


def edit(directory: Path, **changes: Any) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["", "tokenizer.json", "vocab.json"])
def test_tokenizer_json_goes_before_other_files_and_its_config_names_the_end(directory: Path, name: str) -> None:
    tokenizer = Tokenizer.open(str(directory / name))
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode("quick fox").tolist() == backend.encode("quick fox", add_special_tokens=False).ids
    assert tokenizer.token_of(tokenizer.eot) == "<|end|>"
    assert Tokenizer.open(str(directory / name), "<|endoftext|>").eot == 2


def test_an_end_of_text_that_is_not_there_is_refused_with_advice_that_works(directory: Path) -> None:
    edit(directory, eos_token="<|none|>")
    with pytest.raises(UserError, match=r"no end-of-text token '<\|none\|>'") as caught:
        Tokenizer.open(str(directory))
    assert "--eot" in str(caught.value.fix)
    assert Tokenizer.open(str(directory), "<|end|>").eot == 1


def test_files_whose_rules_are_not_gpt2s_are_refused(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    edit(directory, tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(UserError, match="Qwen2Tokenizer") as caught:
        Tokenizer.open(str(directory))
    assert "save_pretrained" in str(caught.value.fix)


def test_an_export_gives_what_was_trained_on(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "a.txt").write_text(TEXT)
    pack([tmp_path / "a.txt"], tmp_path / "out", Tokenizer.open(str(directory)))
    tokenizer = load_index(tmp_path / "out" / "train").load_tokenizer()
    (tmp_path / "export").mkdir()
    assert tokenizer.export(tmp_path / "export", 64) == {"eos_token_id": 1, "bos_token_id": 0}
    read = AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    assert read(TEXT).input_ids == tokenizer.encode(TEXT).tolist()
    assert (read.eos_token, read.bos_token, read.model_max_length) == ("<|end|>", "<|begin|>", 64)
    assert read.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == "fox<|end|>"


def test_tokenizers_are_compared_by_what_they_encode(directory: Path, tmp_path: Path) -> None:
    tokenizer, file = Tokenizer.open(str(directory)), directory / "tokenizer.json"
    assert same_encoding(tokenizer, file)
    assert not same_encoding(Tokenizer(), file)
    definition = json.loads(file.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(definition | {"post_processor": None}))
    assert same_encoding(tokenizer, other)
    other.write_text(json.dumps(definition | {"normalizer": {"type": "Lowercase"}}))
    assert not same_encoding(tokenizer, other)


@pytest.fixture
def spaced(tmp_path: Path) -> Tokenizer:
    """One that drops the space before the first word of a text, as Llama 2's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"]))
    backend.save(str(tmp_path / "spaced.json"))
    return Tokenizer.open(str(tmp_path / "spaced.json"))


def test_a_sampled_text_keeps_the_space_before_its_first_word(spaced: Tokenizer) -> None:
    import torch

    from bigtrain.training.sample import Writer, _OfData

    writer = Writer(torch.nn.Identity(), _OfData(spaced, None, ""), frozenset({spaced.eot}), None, torch.device("cpu"))
    begun, new = (spaced.encode(text).tolist() for text in ("the quick", "brown fox"))
    assert writer._text(begun, [*new, spaced.eot, 5], ()) == (" brown fox", True)
    assert writer._text(begun, new, (" fox",)) == (" brown", True)
    assert writer._text([], new, ()) == ("brown fox", False)
