"""Losses on what the assistant writes: those of transformers, packed or not, at one rank and at two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml

from bigtrain.checkpoint.huggingface import import_hf
from bigtrain.data.kind import kind_named
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.testing.ranks import RankPool
from bigtrain.training.evaluate import Request, measure
from tests.data.chats import CONVERSATIONS, reference, write_tokenizer

CONTEXT = 160
KINDS = ("chatml", "llama3", "gemma")
VOCABULARY = 400
SAME = 1e-5
"""Relative, in FP32."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, tokenizers and shards."""
    root = tmp_path_factory.mktemp("chat")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(root / "hf")
    lines = [json.dumps({"messages": conversation}) for conversation in CONVERSATIONS]
    (root / "chat.jsonl").write_text("\n".join(lines))
    for kind in KINDS:
        tokenizer = Tokenizer.open(str(write_tokenizer(kind, root / kind / "tokenizer")))
        kind_named("supervised").pack([root / "chat.jsonl"], root / kind / "out", PackOptions(tokenizer=tokenizer))
    return root


def by_transformers(root: Path, kind: str) -> tuple[float, float]:
    """Sum of the losses of all tokens that the assistant writes, each conversation by itself; their number."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "hf")
    total = count = 0.0
    for conversation in CONVERSATIONS:
        ids, mask = reference(kind, root / kind / "tokenizer", conversation)
        labels = torch.tensor([id if learned else -100 for id, learned in zip(ids, mask, strict=True)])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        total += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        count += sum(mask)
    return total, count


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, tuple[float, float]]:
    return {kind: by_transformers(root, kind) for kind in KINDS}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
def test_losses_are_those_of_separate_conversations(
    packed: bool, count: int, root: Path, expected: dict[str, tuple[float, float]], tmp_path: Path, ranks: RankPool
) -> None:
    step, model = import_hf(root / "hf", tmp_path / "native")
    shards = {kind: str(root / kind / "out" / "train") for kind in KINDS}
    written: dict[str, Any] = {
        "name": "evaluation",
        "model": {**model, "context": CONTEXT},
        "data": {"train": shards["chatml"], "document_mask": packed},
        "batch": {"size": 3},
        "duration": "1 steps",
        "precision": "fp32",
        "init": {"source": f"{tmp_path / 'native'}@{step}"},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(written))
    found = ranks.run(measure, Request(str(config), shards, VOCABULARY), ranks=count)
    assert all(one == found[0] for one in found)
    for kind, (total, tokens) in expected.items():
        assert found[0][kind]["loss"] == pytest.approx(total / tokens, rel=SAME)
    sums = [sum(column) for column in zip(*expected.values(), strict=True)]
    assert found[0]["all"]["loss"] == pytest.approx(sums[0] / sums[1], rel=SAME)
    assert "bits_per_byte" not in found[0]["all"]
