"""LoRA beside the layers of models of transformers: what peft computes, at one process and at two."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from bigtrain.api.models import load
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.huggingface import export_hf
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.checkpoint.peft import export_peft
from bigtrain.checkpoint.restore import weights_at
from bigtrain.checkpoint.saver import Saver
from bigtrain.config import UserError
from bigtrain.data.index import load_index
from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.engines.support import check_support
from bigtrain.models.families.hf import Config
from bigtrain.models.hf_tasks import auto_class
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.run import ExitCode, RunDirectory
from bigtrain.testing.ranks import RankPool
from bigtrain.training.evaluate import Request, of_run, of_weights, write_request
from bigtrain.training.evaluate import measure as evaluated
from bigtrain.training.export import export_adapters, export_run
from bigtrain.training.weights import Weights
from tests.engines.test_accelerate import Case, global_batch, measure, plain_loss
from tests.models.tiny_hf import CONTEXT, TASKS, config_of

CLOSE = 1e-5
"""Relative, in FP32: sums in another order."""
MERGED = 1e-6
TARGETS = {
    "llama": ("q_proj", "self_attn.o_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "bert": ("query", "output.dense"),
    "t5": ("q", "decoder.block.0.layer.2.DenseReluDense.wo"),
}
SEED = 5
"""As `tests.engines.test_accelerate` has it."""


def adapted(path: Path, **keys: Any) -> Config:
    adapter = {"name": "lora", "rank": 3, "alpha": 12.0, "targets": list(TARGETS[path.name]), **keys}
    plain = config_of(path).plain()
    return Config(**{key: value for key, value in plain.items() if key != "adapter"}, adapter=adapter)


@dataclass(frozen=True)
class AdapterCase(Case):
    @property
    def config(self) -> Config:
        return adapted(self.path)


def by_peft(config: Config, parameters: dict[str, Tensor]) -> Any:
    """peft's own model with the same first values."""
    import peft  # seconds

    base = auto_class(config.task).from_pretrained(config.directory, dtype=torch.float32)
    adapter: Any = config.adapter
    options = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets))
    model = peft.get_peft_model(base, options).eval()
    own = dict(model.named_parameters())
    trained = {name for name, one in own.items() if one.requires_grad}
    with torch.no_grad():
        for name, value in parameters.items():
            own[stored(name)].copy_(value)
    assert trained == set(map(stored, parameters)), "the same layers are adapted"
    return model


def stored(name: str) -> str:
    module, _, own = name.rpartition(".")
    return f"base_model.model.{module}.lora_{own[-1].upper()}.default.weight"


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_three_steps_are_those_of_peft(kind: str, models: Callable[[str], Path], ranks: RankPool) -> None:
    case = AdapterCase(models(kind))
    begun = case.config.build_for_engine(61, SEED)
    first = {name: one.detach().clone() for name, one in begun.named_parameters() if one.requires_grad}
    assert set(first) == {name for name, _ in begun.named_parameters() if case.config.is_adapter(name)}
    plain = by_peft(case.config, first)
    groups = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        groups, lr=1e-2, betas=AdamWConfig().betas, eps=1e-6, weight_decay=AdamWConfig().weight_decay
    )
    losses = []
    for step in range(case.steps):
        batch = {name: torch.from_numpy(array) for name, array in global_batch(step).items()}
        loss, weight = plain_loss(plain, TASKS[kind], batch)
        optimizer.zero_grad()
        (loss / weight).backward()
        norm = torch.nn.utils.clip_grad_norm_(groups, case.clip or float("inf"))
        optimizer.step()
        losses.append((float(loss.detach()), float(weight), float(norm)))
    found = ranks.run(measure, case, ranks=1)[0]
    for numbers, expected in zip(found.numbers, losses, strict=True):
        assert numbers == pytest.approx(expected, rel=CLOSE)
    own = dict(plain.named_parameters())
    for name in first:
        assert (found.weights[f"model.{name}"] - own[stored(name)]).abs().max() < CLOSE
    base = auto_class(case.config.task).from_pretrained(case.path).state_dict()
    kept = [name for name in base if f"model.{name}" in found.weights]
    assert all(torch.equal(base[name], found.weights[f"model.{name}"]) for name in kept)
    assert len(kept) >= len(begun.state_dict()) - len(first) - 4
    assert all(".lora_" in name for name in found.weights if name.startswith("optimizer."))


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("llama", "fsdp2"), pytest.param("llama", "ddp", marks=pytest.mark.slow),
     pytest.param("llama", "zero2", marks=pytest.mark.slow),
     pytest.param("gpt2", "fsdp2", marks=pytest.mark.slow),
     pytest.param("t5", "fsdp2", marks=pytest.mark.slow), pytest.param("bert", "ddp", marks=pytest.mark.slow)],
)  # fmt: skip
def test_two_processes_compute_what_one_computes(
    kind: str, strategy: str, models: Callable[[str], Path], ranks: RankPool
) -> None:
    alone = ranks.run(measure, AdapterCase(models(kind)), ranks=1)[0]
    shared = ranks.run(measure, AdapterCase(models(kind), strategy), ranks=2)[0]
    for numbers, expected in zip(shared.numbers, alone.numbers, strict=True):
        assert numbers == pytest.approx(expected, rel=CLOSE)
    assert shared.evaluation == pytest.approx(alone.evaluation, rel=CLOSE)
    assert shared.gradients.keys() == alone.gradients.keys()
    assert all(name.endswith(("lora_a", "lora_b")) for name in alone.gradients)
    assert shared.weights.keys() == alone.weights.keys()
    for name, value in alone.weights.items():
        assert (shared.weights[name] - value).norm() <= CLOSE * (value.norm() + 1), name


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("llama", ["q_prj"], "no layer 'q_prj'"),
        ("llama", ["mlp"], "is a LlamaMLP"),
        ("llama", ["query"], "no layer 'query'"),
        ("gpt2", ["lm_head"], "shares its matrix with an embedding"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused(
    kind: str, targets: list[str], message: str, models: Callable[[str], Path]
) -> None:
    config = adapted(models(kind), targets=targets)
    with pytest.raises(UserError, match=message) as refused:
        config.check_source(61)
    assert refused.value.where == "model.adapter.targets"
    assert refused.value.fix


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_every_strategy_supports_adapters(strategy: Any, models: Callable[[str], Path]) -> None:
    check_support(AccelerateConfig(strategy=strategy), "hf", LayoutConfig(), frozen=adapted(models("llama")).frozen)


def test_an_adapter_costs_what_it_trains(models: Callable[[str], Path]) -> None:
    config, plain = adapted(models("llama")), config_of(models("llama"))
    # Two layers: query and output 32 x 32, down 48 -> 32.
    own = 2 * 3 * (64 + 64 + 80)
    assert config.parameter_count(61) == plain.parameter_count(61) + own
    attention = 12 * 2 * 32 * CONTEXT
    dense = plain.flops_per_token(61).full - attention
    assert config.flops_per_token(61).full == attention + dense // 6 * 4 + 6 * own
    assert len(config.adapted_weights()) == 6


@pytest.mark.parametrize("kind", ["gpt2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("llama", "t5"))])
def test_exports_are_what_peft_reads_and_what_it_merges(
    kind: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    import peft

    # GPT-2's c_proj of attention is a square matrix of inputs and outputs, which no shape tells apart.
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else list(TARGETS[kind])
    config = adapted(models(kind), targets=targets)
    own = config.build_for_engine(61, SEED).eval()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if config.is_adapter(name):
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False))
    saver.save(
        1, {f"model.{name}": one for name, one in own.named_parameters()}, progress={}, config_hash="", identity=""
    )
    saver.wait()
    saver.close()
    export_peft(tmp_path / "checkpoints", 1, tmp_path / "peft", config=config, base=config.hf)
    export_hf(tmp_path / "checkpoints", 1, tmp_path / "hf", config=config)

    tokens: dict[str, Any] = {"input_ids": torch.arange(CONTEXT)[None] * 5 % 61}
    if kind == "t5":
        tokens["decoder_input_ids"] = tokens["input_ids"]
    auto = auto_class(config.task)
    base = auto.from_pretrained(config.directory).eval()
    with torch.no_grad():
        plain = base(**tokens).logits.clone()
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        expected = own(**tokens).logits
        assert (expected - plain).abs().max() > 1e-3, "the adapters change nothing"
        assert (loaded(**tokens).logits - expected).abs().max() < CLOSE
        merged = auto.from_pretrained(tmp_path / "hf").eval()
        assert (merged(**tokens).logits - expected).abs().max() < CLOSE
    by_peft = loaded.merge_and_unload().state_dict()
    assert max((by_peft[name] - value).abs().max() for name, value in merged.state_dict().items()) < MERGED


@pytest.mark.parametrize(
    "strategy", [pytest.param("fsdp2", marks=pytest.mark.exhaustive), pytest.param("zero2", marks=pytest.mark.slow)]
)
def test_a_run_moves_adapters_alone_resumes_to_the_bit_and_is_exported(
    strategy: str, models: Callable[[str], Path], tmp_path: Path, text_shards: Path, write_config: Callable[..., Path],
    bigtrain: Callable[..., Any], ranks: RankPool,
) -> None:  # fmt: skip
    torch.manual_seed(4)
    shape = transformers.LlamaConfig(
        vocab_size=257, num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    base = tmp_path / "llama"
    transformers.LlamaForCausalLM(shape).save_pretrained(base)
    model = {key: value for key, value in adapted(base).plain().items() if key in ("arch", "hf", "adapter")}
    path = write_config(
        model={**model, "context": 32}, engine={"name": "accelerate", "strategy": strategy}, optimizer={"lr": 1e-2}
    )
    for name, durations in (("whole", [4]), ("resumed", [2, 4])):
        for steps in durations:
            done = bigtrain("train", path, "--nproc", 2, "--name", name, f"duration={steps} steps")
            assert done.returncode == ExitCode.FINISHED, done.stderr
    states = [read_tensors(tmp_path / "runs" / name / "checkpoints", 4, prefix="") for name in ("whole", "resumed")]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    begun = load_file(base / "model.safetensors")
    assert [name for name in begun if not torch.equal(begun[name], states[0][f"model.{name}"])] == []

    run = RunDirectory(tmp_path / "runs" / "whole")
    export_run(run, 4, tmp_path / "hf")
    export_adapters(run, 4, tmp_path / "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    tokens = torch.arange(32)[None] * 5 % 257
    merged, loaded = load(tmp_path / "hf"), load(run.path)
    with torch.no_grad():
        found = loaded(tokens).logits
        assert (merged.logits({"tokens": tokens}) - found).abs().max() < CLOSE
        assert (transformers.LlamaForCausalLM.from_pretrained(base)(tokens).logits - found).abs().max() > 1e-3
    held_out = {"held out": load_index(text_shards / "validation")}
    exported = Weights.of(weights_at(str(tmp_path / "hf"), tmp_path))
    losses = []
    for config, rows in (of_run(run, 4, [], held_out), of_weights(exported, [], held_out)):
        write_request(tmp_path, config, Request("evaluated.yaml", {}, rows))
        request = Request(str(tmp_path / "evaluated.yaml"), {"held out": str(text_shards / "validation")}, rows)
        losses.append(ranks.run(evaluated, request, ranks=1)[0]["all"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)
