"""Recompute changes what is kept, not one bit of what is computed, and sends nothing twice that it keeps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.models.config import FAMILIES
from bigtrain.models.init import initialise
from bigtrain.parallel.config import Recompute
from bigtrain.parallel.recompute import recompute_blocks
from bigtrain.testing.equivalence import OF_ALL, OF_OWN, How, What, build, micro_batches
from bigtrain.testing.ranks import RankPool

GPT2 = {"arch": "gpt2", "layers": 3, "width": 32, "heads": 4, "dropout": 0.2}
LLAMA = {"arch": "llama", "layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "qk_norm": True}


class Counts(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[operator._schema.name] += 1
        return operator(*args, **(kwargs or {}))

    def of(self, *names: str) -> int:
        return sum(count for name, count in self.seen.items() if any(part in name for part in names))


def run(model: dict[str, Any], recompute: Recompute, compiled: bool = False) -> tuple[dict[str, Tensor], Counts]:
    """Gradients by name, and the operators of the forward and the backward pass."""
    built: Any = FAMILIES[model["arch"]](**model, context=16).build(61)
    initialise(built, seed=1)
    blocks = [block for _, block in built.blocks()]
    recompute_blocks(blocks, recompute, compiled=compiled)
    if compiled:
        for block in blocks:
            block.compile()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 61, (4, 17)))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": torch.ones(4, 16), "keys": torch.arange(4)}
    with Counts() as counts:
        loss = built(batch).loss
        loss.backward()
    return {name: parameter.grad for name, parameter in built.named_parameters()}, counts


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_recompute_gives_the_same_bits_under_the_same_names(model: dict[str, Any]) -> None:
    gradients, _ = run(model, "none")
    for recompute in ("selective", "full"):
        again, _ = run(model, recompute)
        assert gradients.keys() == again.keys()
        assert all(gradient.equal(again[name]) for name, gradient in gradients.items()), recompute


def test_selective_multiplies_and_attends_once_and_full_twice() -> None:
    counts = {recompute: run(LLAMA, recompute)[1] for recompute in ("none", "selective", "full")}
    products = {recompute: count.of("::mm", "::addmm") for recompute, count in counts.items()}
    attention = {recompute: count.of("scaled_dot_product") for recompute, count in counts.items()}
    layers = LLAMA["layers"]
    assert attention == {"none": 2 * layers, "selective": 2 * layers, "full": 3 * layers}
    # The last of a block's seven products is not needed again.
    assert products == {"none": products["none"], "selective": products["none"], "full": products["none"] + 6 * layers}
    assert counts["selective"].of("::silu") > counts["none"].of("::silu")


WHAT = What({**LLAMA, "layers": 2, "dropout": 0.1}, steps=1)


def sent(what: What, how: How) -> tuple[dict[str, Tensor], Counter[str], int]:
    """Of a step of this rank: local gradients, collectives by name, matrix products."""
    engine = build(what, how)
    batch = micro_batches(what, how, 0, engine.data_parallel_rank, engine.data_parallel_size)
    with Counts() as counts:
        engine.backward(0, batch)
    local = {name: p.grad.to_local().clone() for name, p in engine.model.named_parameters()}
    engine.close()
    collectives = Counter({name: count for name, count in counts.seen.items() if name.startswith("c10d::")})
    return local, collectives, counts.of("::mm", "::addmm")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"tp": 2}, id="tp2"),
        pytest.param({"tp": 2, "sequence_parallel": False}, id="without sequence parallel", marks=pytest.mark.slow),
        pytest.param({"dp_shard": 2}, id="dp2", marks=pytest.mark.slow),
    ],
)
def test_selective_sends_and_multiplies_nothing_twice(ranks: RankPool, layout: dict[str, Any]) -> None:
    found = {
        recompute: ranks.run(sent, WHAT, How(2, layout, {"recompute": recompute}), ranks=2)
        for recompute in ("none", "selective", "full")
    }
    for rank in range(2):
        (plain, sends, products), (selective, sends_again, products_again), (full, sends_twice, _) = (
            found[recompute][rank] for recompute in ("none", "selective", "full")
        )
        assert sends_again == sends
        assert products_again == products
        assert all(value.equal(selective[name]) and value.equal(full[name]) for name, value in plain.items())
        assert (sends_twice.total() > sends.total()) == ("tp" in layout), "the count sees no exchange of activations"


@pytest.mark.slow
def test_selective_recompute_goes_with_compiled_blocks() -> None:
    model = {**GPT2, "layers": 1}
    gradients, _ = run(model, "none")
    compiled, _ = run(model, "selective", compiled=True)
    overall = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        # A key's bias has the gradient zero and shows the rounding of what cancels: hence the norm of all.
        allowed = OF_OWN * gradient.norm() + OF_ALL * overall
        assert (compiled[name] - gradient).norm() <= allowed, name
