"""Recurrent language models: simple units (Elman 1990), LSTM (Hochreiter, Schmidhuber 1997), GRU (Cho et al. 2014).

Dropout is applied between layers, not between time steps (Zaremba et al. 2014). Each sequence starts from a state of
zero.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES
from bigtrain.models.plain import Batch, PlainConfig

CELLS: dict[str, Any] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


@FAMILIES.register
class Config(PlainConfig):
    """A model with an embedding, recurrent layers, and a head."""

    loss_unit: ClassVar[str] = "nats per token"

    arch: Literal["rnn"] = "rnn"
    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    """Type of the recurrent units; rnn: tanh of a weighted sum."""
    layers: Annotated[int, Ge(1)] = 2
    """Number of stacked recurrent layers."""
    width: Annotated[int, Ge(1)] = 256
    """Number of units of a layer, and width of the embedding."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout rate of each layer's output, before the next layer and before the head."""

    def build(self, vocab_size: int) -> RecurrentLM:
        """The model, initialised by torch's defaults."""
        return RecurrentLM(self, vocab_size)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropies (B, C) of the targets, in nats."""
        return F.cross_entropy(output.transpose(1, 2), batch["targets"], reduction="none")


class RecurrentLM(nn.Module):
    """A language model of recurrent layers."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.context, width, layers = config.context, config.width, config.layers
        self.embedding = nn.Embedding(vocabulary, width)
        between = config.dropout if layers > 1 else 0.0
        self.layers = CELLS[config.cell](width, width, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, C, vocabulary) of the token that follows each of `tokens` (B, C)."""
        hidden, _ = self.layers(self.embedding(tokens))
        return self.head(self.dropout(hidden))

    def logits(self, batch: Batch) -> Tensor:
        """FP32 logits (B, C, vocabulary) for text generation (`bigtrain sample`)."""
        return self(batch["tokens"]).float()
