"""Recompute changes what is kept, not one bit of what is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigtrain.models.config import family
from bigtrain.models.init import initialise
from bigtrain.parallel.recompute import recompute_blocks


def run(recompute: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the bytes that the forward pass keeps for the backward pass."""
    model: Any = family("gpt2")(layers=3, width=32, heads=4, context=16, dropout=0.2).build(61)
    initialise(model, seed=1)
    if recompute:
        recompute_blocks([block for _, block in model.blocks()])
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 61, (4, 17)))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": torch.ones(4, 16), "keys": torch.arange(4)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model(batch)
    bytes_kept = sum(kept.values())
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, bytes_kept


def test_recompute_gives_the_same_bits_under_the_same_names_and_keeps_less() -> None:
    (gradients, kept), (again, kept_less) = run(recompute=False), run(recompute=True)
    assert gradients.keys() == again.keys()
    assert all(gradient.equal(again[name]) for name, gradient in gradients.items())
    assert kept_less < kept / 3
