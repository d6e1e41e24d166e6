"""BERT: which tokens are hidden, and that it computes what transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from bigtrain.models.families.bert import Bert, Config

VOCABULARY = 50
SAME_LOGITS = 1e-5


def test_eight_in_ten_chosen_tokens_are_masked_one_replaced_and_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = Config(context=100, layers=1, width=8, heads=2).build(VOCABULARY)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(network, "guess", seen.append)
    tokens = torch.randint(VOCABULARY, (500, 100))
    _, chosen = network(tokens)
    (shown,) = seen
    assert torch.equal(shown[~chosen], tokens[~chosen])
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.01)
    masked, same = (shown[chosen] == VOCABULARY).float().mean(), (shown[chosen] == tokens[chosen]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert same == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.02)


@pytest.mark.slow
def test_it_gives_the_logits_of_transformers() -> None:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
    hf = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=VOCABULARY + 1, max_position_embeddings=12, **shape)  # type: ignore[arg-type]
    ).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network = Config(context=12, layers=2, width=16, heads=2).build(VOCABULARY).eval()
    network.load_state_dict(_from_transformers(hf.state_dict(), network))
    tokens = torch.randint(VOCABULARY + 1, (3, 12))
    with torch.no_grad():
        expected = hf(tokens).logits[..., :VOCABULARY]
        assert (network.guess(tokens) - expected).abs().max() <= SAME_LOGITS


def _from_transformers(hf: dict[str, torch.Tensor], network: Bert) -> dict[str, Any]:
    """Weights under the names of this family; the embedding of the only token type is part of every position's."""
    native = dict(network.state_dict())
    embeddings, head = "bert.embeddings.", "cls.predictions."
    native["tokens.weight"] = hf[f"{embeddings}word_embeddings.weight"]
    types = hf[f"{embeddings}token_type_embeddings.weight"]
    native["positions.weight"] = hf[f"{embeddings}position_embeddings.weight"] + types[0]
    native["bias"] = hf[f"{head}bias"][:VOCABULARY]
    for kind in ("weight", "bias"):
        native[f"norm.{kind}"] = hf[f"{embeddings}LayerNorm.{kind}"]
        native[f"transform.0.{kind}"] = hf[f"{head}transform.dense.{kind}"]
        native[f"transform.2.{kind}"] = hf[f"{head}transform.LayerNorm.{kind}"]
        for number in range(len(network.layers)):
            own, layer = f"layers.{number}.", f"bert.encoder.layer.{number}."
            three = [hf[f"{layer}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            native[f"{own}self_attn.in_proj_{kind}"] = torch.cat(three)
            for name, hf_name in {
                "self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
                "linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm",
            }.items():  # fmt: skip
                native[f"{own}{name}.{kind}"] = hf[f"{layer}{hf_name}.{kind}"]
    return native
