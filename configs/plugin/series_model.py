"""A model of arrays: a series x (length, features) becomes the numbers y (targets,)."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import nn

from bigtrain.models.config import DataKind
from bigtrain.models.plain import Batch, LossSum, PlainConfig, PlainModel


class Config(PlainConfig):  # the keys under `model` in the YAML
    data_kind: ClassVar[DataKind] = "arrays"
    arch: Literal["series-model"] = "series-model"
    length: int
    features: int
    targets: int
    width: int = 64
    layers: int = 2

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:  # what the shards must hold: x.npy and y.npy
        return {"x": (self.length, self.features), "y": (self.targets,)}

    def build(self, vocab_size: int) -> nn.Module:  # the number of classes: 0, for there are none
        return SeriesModel(self)


class SeriesModel(PlainModel):  # an nn.Module
    def __init__(self, config: Config) -> None:
        super().__init__()
        block = {"nhead": 4, "dim_feedforward": 4 * config.width, "dropout": 0.0, "batch_first": True}
        self.embedding = nn.Linear(config.features, config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(config.width, **block) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.targets)

    def forward(self, batch: Batch) -> LossSum:
        x = self.embedding(batch["x"].float()) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        predicted = self.head(x.mean(dim=1)).float()
        losses = F.mse_loss(predicted, batch["y"].float(), reduction="none").mean(dim=1)
        return LossSum((losses * batch["weights"]).sum(), batch["weights"].sum())
