"""A tiny language model that comes with `--plugin`: sequences with given keys have a bad gradient or loss."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.models.plain import Batch, LossSum, PlainConfig, PlainModel


class Config(PlainConfig):
    arch: Literal["poisoned"] = "poisoned"
    width: int = 16
    endless: tuple[int, ...] = ()
    """Keys of sequences whose gradient is infinite."""
    high: tuple[int, ...] = ()
    """Keys of sequences whose loss is a hundred times what it should be."""

    def build(self, vocab_size: int) -> nn.Module:
        return Poisoned(self, vocab_size)


class Poisoned(PlainModel):
    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList([nn.Linear(config.width, config.width)])
        self.head = nn.Linear(config.width, vocab_size)

    def forward(self, batch: Batch) -> LossSum:
        x = self.embedding(batch["tokens"])
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        losses = F.cross_entropy(self.head(x).float().transpose(1, 2), batch["targets"], reduction="none")
        factor = torch.ones_like(batch["keys"], dtype=torch.float32)
        for keys, by in ((self.config.endless, float("inf")), (self.config.high, 100.0)):
            for key in keys:
                factor = torch.where(batch["keys"] == key, by, factor)
        return LossSum((losses * factor[:, None] * batch["weights"]).sum(), batch["weights"].sum())
