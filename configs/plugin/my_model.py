from typing import Literal

import torch.nn.functional as F
from torch import nn

from bigtrain.models.plain import Batch, LossSum, PlainConfig, PlainModel


class Config(PlainConfig):  # the keys under `model` in the YAML
    arch: Literal["my-model"] = "my-model"
    width: int = 64
    layers: int = 2

    def build(self, vocab_size: int) -> nn.Module:
        return MyModel(self, vocab_size)


class MyModel(PlainModel):  # an nn.Module
    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        block = {"nhead": 4, "dim_feedforward": 4 * config.width, "dropout": 0.0, "batch_first": True}
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(config.width, **block) for _ in range(config.layers))
        self.head = nn.Linear(config.width, vocab_size)

    def forward(self, batch: Batch) -> LossSum:
        tokens, weights = batch["tokens"], batch["weights"]  # (B, C)
        x = self.embedding(tokens) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, mask, is_causal=True)
        losses = F.cross_entropy(self.head(x).float().transpose(1, 2), batch["targets"], reduction="none")
        return LossSum((losses * weights).sum(), weights.sum())
