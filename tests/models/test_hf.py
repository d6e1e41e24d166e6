"""Models of transformers by directory: what is counted, what is refused, what they are known by."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigtrain.config import UserError
from bigtrain.models.families.hf import Config
from bigtrain.models.hf_tasks import examples, loss_sum
from tests.models.tiny_hf import CONTEXT, TASKS, VOCABULARY, config_of


@pytest.mark.parametrize("kind", TASKS)
def test_counts_are_those_of_the_model(models: Callable[[str], Path], kind: str) -> None:
    config = config_of(models(kind))
    model = config.build(VOCABULARY)
    assert config.parameter_count(VOCABULARY) == sum(parameter.numel() for parameter in model.parameters())
    flops = config.flops_per_token(VOCABULARY)
    assert flops.full >= flops.causal > 0
    model.train()
    tokens = torch.randint(0, VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(3))
    batch = {
        "tokens": tokens,
        "targets": tokens.roll(-1, 1),
        "weights": torch.ones(3, CONTEXT),
        "keys": torch.arange(3),
    }
    assert torch.equal(*(loss_sum(model, examples(config, copy.deepcopy(batch))).loss for _ in range(2))), "dropout"


def test_what_a_model_cannot_do_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    bert, gpt2 = str(models("bert")), str(models("gpt2"))
    with pytest.raises(ValueError, match="dropout of a Hugging Face model is always 0"):
        Config(hf=gpt2, context=CONTEXT, dropout=0.1)
    with pytest.raises(UserError, match="does not support task 'causal'"):
        Config(hf=bert, context=CONTEXT).check_source(VOCABULARY)
    with pytest.raises(UserError, match="does not support task 'masked'"):
        Config(hf=gpt2, context=CONTEXT, task="masked", mask_token=1).check_source(VOCABULARY)
    with pytest.raises(UserError, match="65 different tokens, but the model has 64"):
        Config(hf=gpt2, context=CONTEXT).check_source(65)
    with pytest.raises(UserError, match="longer than the model's 32 positions"):
        Config(hf=gpt2, context=33).check_source(VOCABULARY)
    with pytest.raises(UserError, match="mask token is not known"):
        Config(hf=bert, context=CONTEXT, task="masked").check_source(VOCABULARY)
    (tmp_path / "config.json").write_text((models("gpt2") / "config.json").read_text())
    with pytest.raises(UserError, match="There are no weights"):
        Config(hf=str(tmp_path), context=CONTEXT).build(VOCABULARY)


def test_parameters_that_the_file_lacks_are_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    weights = load_file(models("llama") / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((models("llama") / "config.json").read_text())
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        Config(hf=str(tmp_path), context=CONTEXT).build(VOCABULARY)


def test_the_fingerprint_is_of_the_content(models: Callable[[str], Path], tmp_path: Path) -> None:
    copied = shutil.copytree(models("gpt2"), tmp_path / "elsewhere")
    original = Config(hf=str(models("gpt2")), context=CONTEXT).fingerprint()
    assert Config(hf=str(copied), context=CONTEXT).fingerprint() == original
    weights = copied / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert Config(hf=str(copied), context=CONTEXT).fingerprint() != original
