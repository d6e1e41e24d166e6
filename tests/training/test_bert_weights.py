"""A BERT that was trained elsewhere, through the commands: its tokenizer and its mask stay in use, and it goes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.run import ExitCode, load_config

SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
"""Where bert-base-uncased has them."""
WORDS = ["the", "a", "of", "and", "to", "in", "is", "it", "was", "he", "for", "on", "are", "as", "with", "his", "they"]
VOCABULARY = [SPECIAL.get(id, f"[unused{id}]") for id in range(104)] + WORDS + [f"##{letter}" for letter in "sdne"]
SAME_LOGITS, SAME_LOSS = 1e-5, 1e-5
MODEL = {"layers": 2, "width": 16, "heads": 2, "max_positions": 24, "token_types": 2, "mask": 103}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory as transformers writes it: weights, and a tokenizer of words with the special tokens' usual ids."""
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24,
    )  # fmt: skip
    model: Any = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(tmp_path / "hf")
    transformers.BertTokenizer(vocab={word: id for id, word in enumerate(VOCABULARY)}).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def pack(bigtrain: Callable, source: Path, tmp_path: Path) -> Callable[..., Path]:
    def packed(name: str, lines: list[dict[str, Any]], *options: object) -> Path:
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        arguments = ("--tokenizer", source, "--out", tmp_path / name, *options)
        result = bigtrain("data", "pack", tmp_path / f"{name}.jsonl", *arguments)
        assert result.returncode == 0, result.stderr
        return tmp_path / name / "train"

    return packed


@pytest.fixture
def texts(pack: Callable) -> Path:
    """Documents as BERT saw them: [CLS], a text, [SEP]."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (40, 30), generator=generator).tolist()
    return pack("texts", [{"text": " ".join(WORDS[id] for id in row)} for row in picks], "--bos", "yes")


@pytest.mark.slow
def test_it_is_imported_trained_by_its_own_mask_and_exported(
    source: Path, texts: Path, write_config: Callable, bigtrain: Callable, tmp_path: Path
) -> None:
    imported = bigtrain("checkpoint", "import", source, "--out", tmp_path / "imported", "--json")
    model = json.loads(imported.stdout)["model"]
    assert model == {"arch": "bert", "context": 24, "dropout": 0.1, **MODEL}
    ended = {}
    for name, begun in (("direct", source), ("from-import", f"{tmp_path / 'imported'}@0")):
        # Two ranks: each reads rows of queries and keys.
        config = write_config(
            name=name, model={**model, "context": 8, "dropout": 0.0}, init={"source": str(begun)}, duration="2 steps",
            data={"train": str(texts)}, optimizer={"frozen": ["layers.*", "tokens.*", "types.*"]},
        )  # fmt: skip
        result = bigtrain("train", config, "--nproc", "2")
        assert result.returncode == ExitCode.FINISHED, result.stderr
        ended[name] = read_tensors(tmp_path / "runs" / name / "checkpoints", 2)
    assert all(torch.equal(value, ended["from-import"][name]) for name, value in ended["direct"].items())

    result = bigtrain("checkpoint", "export", "direct", "--format", "hf", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    before, after = (load_file(place / "model.safetensors") for place in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("layer." in name or "word" in name or "type" in name for name in changed)
    assert "cls.predictions.bias" in changed, "no step was taken"
    _goes_back(tmp_path, ended["direct"], source)


def _goes_back(place: Path, weights: dict[str, torch.Tensor], source: Path) -> None:
    """What is exported computes the run's logits and has the tokenizer that the run began with."""
    back: Any = transformers.AutoModelForMaskedLM.from_pretrained(place / "out").eval()
    assert type(back) is transformers.BertForMaskedLM
    assert back.config.pad_token_id == 0
    network: Any = load_config(place / "runs" / "direct" / "config.yaml").model.build(len(VOCABULARY)).eval()
    network.load_state_dict(weights)
    first, own = (transformers.AutoTokenizer.from_pretrained(one) for one in (source, place / "out"))
    text = "he was [MASK] the tos"
    tokens = own(text, return_tensors="pt")["input_ids"]
    assert tokens.tolist() == [first(text)["input_ids"]]
    assert tokens[0, [0, -1]].tolist() == [101, 102]
    assert own.mask_token_id == network.mask == 103
    with torch.no_grad():
        assert (network.guess(tokens) - back(tokens).logits).abs().max() <= SAME_LOGITS


@pytest.mark.slow
def test_a_classifier_begins_with_it_and_a_new_head(
    source: Path, pack: Callable, write_config: Callable, bigtrain: Callable, tmp_path: Path
) -> None:
    rows = [{"text": " ".join(WORDS[number % 7 : number % 7 + 6]), "label": number % 2} for number in range(16)]
    data = {"train": str(pack("classes", rows, "--kind", "classified"))}
    model = {"arch": "bert_classifier", "context": 8, **MODEL, "vocabulary": len(VOCABULARY)}
    refused = bigtrain("train", write_config(model=model, data=data, init={"source": str(source)}))
    assert refused.returncode == ExitCode.USER
    assert "The weights lack" in refused.stderr
    for name, more, fresh in (("cls", {"first": 101}, []), ("vector", {}, ["start"])):
        config = write_config(
            name=name, model={**model, **more}, data=data, duration="1 steps", optimizer={"frozen": ["layers.*"]},
            init={"source": str(source), "fresh": ["classes", "bias", *fresh]},
        )  # fmt: skip
        result = bigtrain("train", config)
        assert result.returncode == ExitCode.FINISHED, result.stderr
        found = read_tensors(tmp_path / "runs" / name / "checkpoints", 1)
        own, begun = found["layers.1.linear1.weight"], load_file(source / "model.safetensors")
        assert torch.equal(own, begun["bert.encoder.layer.1.intermediate.dense.weight"])
        assert found["classes"].shape == (2, 16)


@pytest.mark.slow
def test_a_run_from_scratch_is_exported_with_a_mask_and_evaluated(
    texts: Path, write_config: Callable, bigtrain: Callable, tmp_path: Path
) -> None:
    model = {"arch": "bert", "layers": 1, "width": 16, "heads": 2, "context": 8}
    config = write_config(model=model, data={"train": str(texts)}, duration="2 steps")
    assert bigtrain("train", config).returncode == ExitCode.FINISHED
    result = bigtrain("checkpoint", "export", "tiny", "--format", "hf", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.mask_token_id == len(VOCABULARY)
    assert tokenizer("he <mask>", add_special_tokens=False)["input_ids"] == [VOCABULARY.index("he"), len(VOCABULARY)]
    # The same batches: which tokens are hidden goes by the place of a sequence in them.
    result = bigtrain("evaluate", "tiny", tmp_path / "out", "--data", texts, "--json", "batch.size=4")
    assert result.returncode == 0, result.stderr
    own, exported = (one["sets"]["all"]["loss"] for one in json.loads(result.stdout)["checkpoints"])
    assert exported == pytest.approx(own, rel=SAME_LOSS)
