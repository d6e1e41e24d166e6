"""BERT: which tokens are hidden, and weights to and from transformers: every tensor and every logit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint.huggingface import export_hf, import_hf, read_hf
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config import UserError
from bigtrain.models.config import FAMILIES
from bigtrain.models.families.bert import Bert, Config
from bigtrain.models.families.bert_classifier import Config as Classifier
from bigtrain.models.hf_files import HfFiles, mask_token
from bigtrain.models.huggingface import to_hf
from bigtrain.training.vocabulary import fill_rows, resized

VOCABULARY, MASK, CLS = 50, 7, 5
SAME_LOGITS = 1e-5
"""Absolute, for logits of order 1 in FP32."""
SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": VOCABULARY, "max_position_embeddings": 12,
}  # fmt: skip
MODEL = {"layers": 2, "width": 16, "heads": 2, "max_positions": 12, "token_types": 2, "mask": MASK}


@pytest.mark.parametrize("mask", [None, MASK])
def test_eight_in_ten_chosen_tokens_are_masked_one_replaced_and_one_left(
    mask: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Config(context=100, layers=1, width=8, heads=2, mask=mask).build(VOCABULARY)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(network, "guess", seen.append)
    tokens = torch.randint(MASK + 1, VOCABULARY, (500, 100))
    _, chosen = network(tokens)
    (shown,) = seen
    assert torch.equal(shown[~chosen], tokens[~chosen])
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.01)
    hidden = shown[chosen] == (VOCABULARY if mask is None else mask)
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.02)
    same = (shown[chosen] == tokens[chosen]).float().mean()
    assert same == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.02)


def random_model(kind: str = "BertForMaskedLM", **keys: Any) -> Any:
    """One of transformers' models with random weights, norms and biases too."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**{**SHAPE, **keys})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return random_model()


@pytest.fixture(scope="module")
def directory(hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "hf"
    hf_model.save_pretrained(path, max_shard_size="8KB")
    (path / "vocab.txt").write_text("\n".join("[MASK]" if id == MASK else f"word{id}" for id in range(VOCABULARY)))
    return path


@pytest.mark.parametrize("auto", ["BertForMaskedLM", "AutoModelForMaskedLM"])
def test_weights_go_in_and_out_and_every_logit_and_tensor_stays(
    auto: str, hf_model: Any, directory: Path, tmp_path: Path
) -> None:
    assert len(list(directory.glob("*.safetensors"))) > 2, "queries and keys should be in several files"
    step, keys = import_hf(directory, tmp_path / "native")
    assert keys == {"arch": "bert", "context": 12, "dropout": 0.1, **MODEL}
    config = FAMILIES["bert"](**keys)
    network = _network(config, tmp_path / "native")
    tokens = torch.randint(VOCABULARY, (3, 12))
    with torch.no_grad():
        expected = hf_model(tokens).logits
        assert (network.guess(tokens) - expected).abs().max() <= SAME_LOGITS

    export_hf(tmp_path / "native" / "checkpoints", step, tmp_path / "out", config=config, max_file_bytes=9000)
    back, info = getattr(transformers, auto).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    weights = hf_model.state_dict()
    assert back.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
    _, again = import_hf(tmp_path / "out", tmp_path / "again")
    assert again == keys


def _network(config: Any, place: Path) -> Bert:
    network: Bert = config.build(VOCABULARY).eval()
    network.load_state_dict(read_tensors(place / "checkpoints", 0))
    return network


def test_a_mask_of_its_own_and_folded_types_go_out_and_in(tmp_path: Path) -> None:
    """What a run from scratch has: transformers gets a token more, whose probability is zero."""
    torch.manual_seed(0)
    config = Config(context=12, layers=2, width=16, heads=2)
    network = config.build(VOCABULARY).eval()
    state = to_hf(config.hf_names(), network.state_dict())
    state |= {name: torch.zeros(shape) for name, shape in config.hf_zeros().items()}
    (tmp_path / "out").mkdir()
    save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out" / "config.json").write_text(json.dumps(config.hf_config(VOCABULARY)))
    back: Any = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(VOCABULARY + 1, (3, 12))
    with torch.no_grad():
        logits, expected = back(tokens).logits, network.guess(tokens)
    assert (logits[..., :VOCABULARY] - expected).abs().max() <= SAME_LOGITS
    assert (logits.softmax(-1)[..., :VOCABULARY] - expected.softmax(-1)).abs().max() <= SAME_LOGITS
    _, keys = import_hf(tmp_path / "out", tmp_path / "native")
    assert keys["mask"] is None
    again = _network(FAMILIES["bert"](**keys), tmp_path / "native")
    with torch.no_grad():
        assert (again.guess(tokens) - expected).abs().max() <= SAME_LOGITS


def test_files_as_bert_was_published_are_read(hf_model: Any, tmp_path: Path) -> None:
    """With pooler and next-sentence head, the norms' older names, positions as a constant, and a tied decoder."""
    random_model("BertForPreTraining").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for name in list(tensors):
        for new, old in older.items():
            if name.endswith(new):
                tensors[name.replace(new, old)] = tensors.pop(name)
    tensors["bert.embeddings.position_ids"] = torch.arange(12)[None]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    _, keys = import_hf(tmp_path / "hf", tmp_path / "native")
    assert keys["mask"] == VOCABULARY - 1, "where nothing says which token is the mask, the last one is"
    found = read_tensors(tmp_path / "native" / "checkpoints", 0)
    assert torch.equal(found["norm.weight"], tensors["bert.embeddings.LayerNorm.gamma"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
        ({"add_cross_attention": True}, "add_cross_attention: True"),
        ({"is_decoder": True}, "is_decoder: True"),
        ({"intermediate_size": 48}, "intermediate_size: 48.*only 64"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps: 1e-05"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: False"),
    ],
)
def test_a_config_that_the_family_does_not_have_is_refused(keys: dict[str, Any], said: str, directory: Path) -> None:
    files = HfFiles.open(directory)
    files.config.update(keys)
    with pytest.raises(UserError, match=said):
        files.keys()
    config = Config(context=8, **MODEL)
    with pytest.raises(UserError, match=said):
        files.check_fit(config, config.parameter_shapes(VOCABULARY))


def test_a_mask_is_found_in_any_file_of_a_tokenizer(tmp_path: Path) -> None:
    files = {
        "vocab.txt": "[PAD]\n[MASK]\n",
        "tokenizer.json": json.dumps({"added_tokens": [{"content": "[MASK]", "id": 3}], "model": {"vocab": {"a": 0}}}),
        "tokenizer_config.json": json.dumps({"mask_token": {"content": "<m>"}, "added_tokens_decoder": {
            "5": {"content": "<m>"}}}),
    }  # fmt: skip
    found = []
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        found.append(mask_token(tmp_path))
    assert found == [1, 3, 5]
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": [1]}')
    with pytest.raises(UserError, match="The tokenizer of the weights cannot be read"):
        mask_token(tmp_path)


@pytest.mark.parametrize(
    ("keys", "vocabulary", "said"),
    [
        ({"width": 32}, VOCABULARY, r"model.width is 32, .* with 16 \(hidden_size of config.json\)"),
        ({"layers": 3}, VOCABULARY, r"model.layers is 3, .* \(num_hidden_layers of"),
        ({"heads": 4}, VOCABULARY, r"model.heads is 4, .* \(num_attention_heads of"),
        ({"max_positions": None}, VOCABULARY, r"model.max_positions is 8, .* \(max_position_embeddings of"),
        ({"token_types": 0}, VOCABULARY, r"model.token_types is 0, .* \(type_vocab_size of"),
        ({"mask": None}, VOCABULARY, r"model.mask is None, .* with 7 \(mask_token_id of"),
        ({}, VOCABULARY + 1, r"\(50,\) in the weights and \(51,\) here"),
    ],
)
def test_a_model_that_does_not_fit_its_source_is_refused(
    keys: dict[str, Any], vocabulary: int, said: str, directory: Path
) -> None:
    config = Config(context=8, **{**MODEL, **keys})
    with pytest.raises(UserError, match=said):
        HfFiles.open(directory).check_fit(config, config.parameter_shapes(vocabulary))


def test_a_larger_vocabulary_keeps_the_rows_of_its_ids(hf_model: Any, directory: Path) -> None:
    """`init.new_rows`; a mask behind the vocabulary is no row by id."""
    config, files = Config(context=8, **MODEL), HfFiles.open(directory)
    names = config.hf_names()
    weights = {name: torch.zeros(shape) for name, shape in config.parameter_shapes(VOCABULARY + 3).items()}
    found = resized(config, weights, lambda name: files.shape_of(names[name]))
    assert found == {"tokens.weight", "bias"}
    assert not resized(Config(context=8), weights, lambda name: files.shape_of(names[name]))
    for name, source in (("tokens.weight", hf_model.bert.embeddings.word_embeddings.weight),
                         ("bias", hf_model.cls.predictions.bias)):  # fmt: skip
        fill_rows(weights[name], source.detach(), "mean")
        assert torch.equal(weights[name][:VOCABULARY], source)
        assert torch.allclose(weights[name][VOCABULARY:], source.mean(0).expand_as(weights[name][VOCABULARY:]))


def test_ids_that_are_no_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.mask is 7, but the vocabulary has 7 tokens"):
        Config(context=8, **MODEL).check_source(MASK)
    with pytest.raises(UserError, match=r"model\.first is 60, but the vocabulary has 50 tokens"):
        Classifier(context=8, **MODEL, vocabulary=VOCABULARY, first=60).check_source(3)
    with pytest.raises(ValueError, match="max_positions 4 is less than context 8"):
        Config(context=8, max_positions=4)
    with pytest.raises(ValueError, match="max_positions 8 must exceed context 8"):
        Classifier(context=8, vocabulary=VOCABULARY, first=CLS)


@pytest.mark.parametrize(("first", "pooling"), [(CLS, "cls"), (CLS, "mean"), (None, "mean")])
def test_a_classifier_reads_what_transformers_makes_of_a_text(
    first: int | None, pooling: str, hf_model: Any, directory: Path
) -> None:
    config = Classifier(context=8, **MODEL, vocabulary=VOCABULARY, first=first, pooling=pooling)
    network = config.build(3).eval()
    shapes = {name: shape for name, shape in config.parameter_shapes(3).items() if name not in ("classes", "bias")}
    files = HfFiles.open(directory)
    with torch.no_grad():
        read_hf(files, files.check_fit(config, shapes), {name: network.state_dict()[name] for name in shapes})
        tokens, lengths = torch.randint(VOCABULARY, (4, 8)), torch.tensor([8, 3, 1, 5])
        read = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        given = [torch.tensor([[*([] if first is None else [first]), *row]]) for row in read]
        seen = [hf_model.bert(one).last_hidden_state[0] for one in given]
        pooled = torch.stack([one[0] if pooling == "cls" else one.mean(0) for one in seen])
        expected = hf_model.cls.predictions.transform(pooled) @ network.classes.T + network.bias
        assert (network(tokens, lengths) - expected).abs().max() <= SAME_LOGITS
        assert network(tokens, torch.zeros(4, dtype=torch.long)).isfinite().all()
    with pytest.raises(UserError, match=r"The weights lack (bias|classes)"):
        files.check_fit(config, config.parameter_shapes(3))
    with pytest.raises(UserError, match="cannot be exported to transformers"):
        export_hf(directory, 0, directory / "out", config=config)
