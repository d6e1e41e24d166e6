"""What a Hugging Face model's config sets in addition to its logits: the router's loss, positions, countable FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigtrain.config import UserError
from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.models.config import Flops
from bigtrain.models.families.hf import Config
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.testing.ranks import RankPool

VOCABULARY, CONTEXT, BATCH, COEFFICIENT = 61, 12, 4, 0.7


def mixtral(path: Path) -> Config:
    import transformers as hf

    torch.manual_seed(5)
    shape = hf.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=CONTEXT,
        output_router_logits=True, router_aux_loss_coef=COEFFICIENT,
    )  # fmt: skip
    hf.MixtralForCausalLM(shape).save_pretrained(path)
    return Config(hf=str(path), task="causal", context=CONTEXT)


def batch(rank: int = 0, ranks: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    arrays: dict[str, Any] = {name: random.integers(0, VOCABULARY, (BATCH, CONTEXT)) for name in ("tokens", "targets")}
    arrays |= {"weights": np.ones((BATCH, CONTEXT), np.float32), "keys": random.integers(0, 2**62, BATCH)}
    size = BATCH // ranks
    return {name: values[rank * size : (rank + 1) * size] for name, values in arrays.items()}


def first_step(path: str) -> tuple[float, float]:
    """Loss and gradient norm of a step on this rank's part."""
    ranks = Ranks.from_environment()
    engine: Any = AccelerateConfig(strategy="ddp").build(
        Config(hf=path, task="causal", context=CONTEXT), VOCABULARY, AdamWConfig(),
        layout=LayoutConfig(), precision="fp32", seed=1, ranks=ranks,
    )  # fmt: skip
    numbers = engine.train_step(0, [batch(ranks.rank, ranks.world_size)], 1e-3).read()
    engine.close()
    return numbers.loss / numbers.weight, numbers.gradient_norm


@pytest.mark.slow
def test_the_loss_of_a_router_is_transformers_own_at_one_rank_and_two(ranks: RankPool, tmp_path: Path) -> None:
    model = mixtral(tmp_path).build(VOCABULARY)
    tokens, targets = (torch.from_numpy(batch()[name]) for name in ("tokens", "targets"))
    output = model(input_ids=tokens, output_router_logits=True)
    expected = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten()) + COEFFICIENT * output.aux_loss
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for count in (1, 2):
        for loss, gradient in ranks.run(first_step, str(tmp_path), ranks=count):
            assert loss == pytest.approx(expected.item(), rel=1e-5)
            assert gradient == pytest.approx(float(norm), rel=1e-4)


def test_a_mixture_of_experts_has_no_count_of_flops(tmp_path: Path) -> None:
    assert mixtral(tmp_path).flops_per_token(VOCABULARY) == Flops.unknown()


def test_positions_of_roberta_begin_after_the_padding_token(tmp_path: Path) -> None:
    import transformers as hf

    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for pad, longest in ((1, 28), (4, 25)):
        path = tmp_path / str(pad)
        config = hf.RobertaConfig(**shape, intermediate_size=16, max_position_embeddings=30, pad_token_id=pad)
        hf.RobertaForMaskedLM(config).save_pretrained(path)
        section = {"hf": str(path), "task": "masked", "mask_token": 3}
        Config(**section, context=longest).check_source(VOCABULARY)
        with pytest.raises(UserError, match=f"the model's {longest} positions"):
            Config(**section, context=longest + 1).check_source(VOCABULARY)
