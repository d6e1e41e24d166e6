"""What a plain module of PyTorch gets in addition to its forward pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain.models.contract import LossSum, Normal, Ones, Zeros
from bigtrain.models.plain import PlainConfig, PlainModel, sum_over_batch
from bigtrain.models.plain.across import across

VOCABULARY, WIDTH, CONTEXT = 19, 16, 8


class Tied(PlainModel):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.groups = nn.ModuleList([nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False)])])
        self.last = nn.ModuleList([nn.Linear(WIDTH, VOCABULARY, bias=False)])
        self.last[0].weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, batch: dict[str, Tensor]) -> LossSum:
        x = self.embedding(batch["tokens"])
        for layer in (*self.layers, self.groups[0][0]):
            x = x + layer(x)
        logits = self.last[0](x).float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
        return LossSum((losses * batch["weights"]).sum(), batch["weights"].sum())


class Config(PlainConfig):
    arch: Literal["tied"] = "tied"

    def build(self, vocab_size: int) -> nn.Module:
        return Tied()


def test_blocks_are_the_entries_of_lists_that_share_nothing() -> None:
    model = Tied()
    names = [name for name, _ in model.blocks()]
    assert names == ["layers.0", "layers.1", "groups.0.0"]
    assert all(dict(model.named_modules())[name] is block for name, block in model.blocks())


def test_initial_values_follow_the_type_of_the_module() -> None:
    rules = Tied().initialisers()
    assert rules.keys() == dict(Tied().named_parameters()).keys()
    assert rules["embedding.weight"] == rules["attention.in_proj_weight"] == Normal(0.02)
    assert rules["layers.0.0.weight"] == Ones()
    assert rules["layers.0.0.bias"] == rules["layers.0.1.bias"] == rules["attention.in_proj_bias"] == Zeros()


def test_counts_are_those_of_the_module() -> None:
    config = Config(context=CONTEXT)
    count = sum(parameter.numel() for parameter in Tied().parameters())
    assert config.parameter_count(VOCABULARY) == count
    assert config.parameter_count_without_embeddings(VOCABULARY) == count - VOCABULARY * WIDTH
    # 6 a weight that is multiplied with: two layers, the one in a group, the head.
    assert config.flops_per_token(VOCABULARY).full == 6 * (3 * WIDTH * WIDTH + VOCABULARY * WIDTH)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_in_bf16_a_frequent_token_has_its_whole_gradient(stored: torch.dtype) -> None:
    """As in one process, where the table is FP32, and as FSDP gathers it: sums of many rows are not taken in BF16."""
    model = Tied()
    model.compute_dtype = torch.bfloat16
    table = nn.Parameter(model.embedding.weight.detach().to(stored))
    model.embedding.weight = table
    rows = model.embedding(torch.zeros(4096, dtype=torch.int64))
    assert rows.dtype == torch.bfloat16
    rows.float().sum().backward()
    assert table.grad is not None
    assert torch.all(table.grad[0] == 4096)


def test_a_loss_too_coarse_is_refused_where_it_arises() -> None:
    from bigtrain.config import UserError

    class Coarse(Tied):
        def forward(self, batch: dict[str, Tensor]) -> LossSum:
            return LossSum(super().forward(batch).loss.bfloat16(), batch["weights"].sum())

    tokens = torch.zeros(1, CONTEXT, dtype=torch.int64)
    with pytest.raises(UserError, match="a loss in bfloat16"):
        Coarse()({"tokens": tokens, "targets": tokens, "weights": torch.ones(1, CONTEXT)})


class Doubling:
    """Two ranks with equal values."""

    rank = 0
    rows = (2, 2)

    def sum(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_thread_that_computes_activations_again_sums_over_ranks_as_well() -> None:
    # Autograd runs the backward pass of a GPU in threads of its own, which live on from step to step.
    x = torch.ones(2)
    with ThreadPoolExecutor(1) as threads:
        for _ in range(2):
            with across(Doubling(), 2):  # type: ignore[arg-type]
                assert threads.submit(sum_over_batch, x).result().tolist() == [2, 2]
            assert threads.submit(sum_over_batch, x).result().tolist() == [1, 1]


def test_batch_statistics_that_are_computed_again_are_those_of_the_first_time() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.5, 1.0]])
    gradients = []
    for again in (False, True):
        x.grad = None
        with across(Doubling(), 2):  # type: ignore[arg-type]
            made = checkpoint(lambda x: norm(x).sin(), x, use_reentrant=False) if again else norm(x).sin()
            (made * weight).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)
