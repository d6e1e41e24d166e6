"""What an engine's real steps do to weights, beside torch's own optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.models.families.hf import Config
from bigtrain.optim.config import ParameterGroup
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks

VOCABULARY, CONTEXT, BATCH, LR, STEPS = 31, 8, 3, 1e-2, 3
EPS = 1e-5
"""Larger than usual: a key's bias has a gradient of nothing but rounding."""


def test_the_accelerate_engine_updates_weights_as_torch_does(tmp_path: Path) -> None:
    """With weight decay of 1.0 and two scales of the learning rate, which both change every update."""
    import transformers as hf

    torch.manual_seed(2)
    shape = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=CONTEXT)
    hf.GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    config = Config(hf=str(tmp_path), task="causal", context=CONTEXT)
    groups = (ParameterGroup(pattern="*mlp*", lr_scale=0.1), ParameterGroup(pattern="*ln_*", weight_decay=0.5))
    engine: Any = AccelerateConfig().build(
        config, VOCABULARY, AdamWConfig(lr=LR, weight_decay=1.0, clip=None, groups=groups, eps=EPS),
        layout=LayoutConfig(), precision="fp32", seed=1, ranks=Ranks(0, 0, 1, 1),
    )  # fmt: skip
    plain = config.build(VOCABULARY).train()
    settings = {
        name: {"lr": LR * (0.1 if "mlp" in name else 1.0), "weight_decay": 0.5 if "ln_" in name else float(p.ndim > 1)}
        for name, p in plain.named_parameters()
    }
    optimizer = torch.optim.AdamW(
        [{"params": [p], **settings[name]} for name, p in plain.named_parameters()], betas=(0.9, 0.95), eps=EPS
    )
    random = np.random.default_rng(0)
    for step in range(STEPS):
        batch: dict[str, Any] = {
            name: random.integers(0, VOCABULARY, (BATCH, CONTEXT)) for name in ("tokens", "targets")
        }
        batch |= {"weights": np.ones((BATCH, CONTEXT), np.float32), "keys": np.arange(BATCH)}
        engine.train_step(step, [batch], LR)
        logits = plain(input_ids=torch.from_numpy(batch["tokens"])).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch["targets"]).flatten()).backward()
        optimizer.step()
    updated = {name: value for name, value in engine.state().items() if name.startswith("model.")}
    for name, parameter in plain.named_parameters():
        assert updated[f"model.{name}"].detach().numpy() == pytest.approx(parameter.detach().numpy(), abs=2e-5), name
