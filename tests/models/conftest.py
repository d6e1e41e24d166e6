"""Small models and batches that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES
from bigtrain.models.init import initialise

VOCAB = 97


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_decoder() -> Callable[..., nn.Module]:
    """A small decoder of a family with initialized weights; keywords override its config."""

    def make(arch: str, **keys: Any) -> nn.Module:
        shape = {"layers": 2, "width": 32, "heads": 4, "context": 16} | keys
        model = FAMILIES[arch](**shape).build(VOCAB)
        initialise(model, seed=1)
        return model

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """A batch of random tokens whose weights are 0 in places."""

    def make(sequences: int = 3, context: int = 16, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB, (sequences, context + 1), generator=generator)
        weights = (torch.rand(sequences, context, generator=generator) < 0.8).float()
        keys = torch.randint(2**62, (sequences,), generator=generator)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "keys": keys}

    return make
