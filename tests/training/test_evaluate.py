"""`evaluate`: the loss of a checkpoint and of exported weights, as transformers has it, at every layout and engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from bigtrain.checkpoint.huggingface import import_hf
from bigtrain.checkpoint.restore import weights_at
from bigtrain.config import UserError
from bigtrain.data.index import load_index
from bigtrain.data.loader import EvaluationLoader
from bigtrain.jobs.evaluate import evaluate
from bigtrain.testing.ranks import RankPool
from bigtrain.training.evaluate import Request, measure, of_weights, write_request
from bigtrain.training.weights import Weights

CONTEXT = 32
PERPLEXITY = 1e-5
"""Relative, in FP32."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of transformers for the vocabulary of bytes, far from uniform."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=257, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    path = tmp_path_factory.mktemp("weights") / "hf"
    model.save_pretrained(path)
    return path


def by_transformers(weights: Path, shards: Path) -> float:
    """Mean loss over all held-out sequences."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(weights)
    total = count = 0.0
    options: dict[str, Any] = {"batch_size": 4, "context": CONTEXT, "dp_rank": 0, "dp_size": 1, "seed": 0}
    with EvaluationLoader(shards, batches=1 << 40, **options) as loader, torch.no_grad():
        for batch in loader:
            for micro in batch.micro_batches:
                tokens, targets, counts = (torch.as_tensor(micro[key]) for key in ("tokens", "targets", "weights"))
                losses = F.cross_entropy(model(tokens.long()).logits.transpose(1, 2), targets.long(), reduction="none")
                total += float((losses.double() * counts).sum())
                count += float(counts.sum())
    return total / count


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["layout.tp=2"]),
    "pp2": (2, ["layout.pp=2"]),
    "ZeRO-3": (2, ["engine.name=deepspeed", "engine.zero=3"]),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name == "ZeRO-3" else []) for name in LAYOUTS]
)
def test_perplexity_at_a_layout_is_that_of_transformers(
    layout: str, weights: Path, text_shards: Path, tmp_path: Path, ranks: RankPool
) -> None:
    import_hf(weights, tmp_path / "native")
    count, overrides = LAYOUTS[layout]
    held_out = {"held out": load_index(text_shards / "validation")}
    imported = Weights.of(weights_at(str(tmp_path / "native"), tmp_path))
    config, rows = of_weights(imported, ["batch.size=4", *overrides], held_out)
    request = Request("config.yaml", {"held out": str(text_shards / "validation")}, rows)
    write_request(tmp_path, config, request)
    found = ranks.run(measure, replace(request, config=str(tmp_path / "config.yaml")), ranks=count)
    expected = by_transformers(weights, text_shards / "validation")
    assert all(one == found[0] for one in found)
    assert found[0]["all"]["loss"] == pytest.approx(expected, rel=PERPLEXITY)
    assert found[0]["all"]["perplexity"] == pytest.approx(math.exp(expected), rel=PERPLEXITY)
    # A token of bytes is a byte, but for the ends of documents.
    bits = found[0]["all"]["bits_per_byte"]
    assert bits is not None
    assert expected / math.log(2) < bits < 1.02 * expected / math.log(2)


@pytest.mark.slow
def test_a_run_and_its_export_are_one_table_and_the_run_records_it(
    bigtrain: Callable[..., Any], write_config: Callable[..., Path], text_shards: Path, tmp_path: Path
) -> None:
    assert bigtrain("train", write_config(duration="4 steps")).returncode == 0
    assert bigtrain("checkpoint", "export", "tiny", "--format", "hf", "--out", "out").returncode == 0
    assert bigtrain("checkpoint", "import", "out", "--out", "back").returncode == 0
    data = ("--data", f"held={text_shards / 'validation'}", "--data", text_shards / "train")
    found = bigtrain("evaluate", "tiny", "out", *data, "--json", "--nproc", 2, "--sequences", 60, "model.context=32")
    assert found.returncode == 2
    assert "is a key of the training, which an evaluation cannot change" in json.loads(found.stdout)["error"]
    found = bigtrain("evaluate", "tiny", "out", "back", *data, "--json", "--sequences", 60, "--nproc", 2, "layout.tp=2")
    assert found.returncode == 0, found.stderr
    run, exported, imported = json.loads(found.stdout)["checkpoints"]
    assert (run["step"], exported["step"], imported["step"]) == (4, None, 0)
    assert imported["sets"] == exported["sets"]
    assert run["sets"].keys() == {"held", "train", "all"}
    for name, numbers in run["sets"].items():
        assert numbers == pytest.approx(exported["sets"][name], rel=PERPLEXITY)
    events = [json.loads(line) for line in (tmp_path / "runs/tiny/events.jsonl").read_text().splitlines()]
    assert [event["sets"] for event in events if event["event"] == "evaluated"] == [run["sets"]]


def test_what_does_not_go_together_is_refused_before_a_process_starts(weights: Path, text_shards: Path) -> None:
    data = [str(text_shards / "validation")]
    with pytest.raises(UserError, match="does not divide"):
        evaluate([str(weights)], data, overrides=["layout.tp=8"], procs=8)
    with pytest.raises(UserError, match="make 1 ranks"):
        evaluate([str(weights)], data, overrides=["layout.pp=2"])
    with pytest.raises(UserError, match="Two sets have the name"):
        evaluate([str(weights)], data * 2)
