"""Recurrent language models: simple units (Elman 1990), LSTM (Hochreiter, Schmidhuber 1997), GRU (Cho et al. 2014).

Dropout lies between the layers and not in time (Zaremba et al. 2014). Each sequence begins with a state of zero.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES
from bigtrain.models.plain import Batch, PlainConfig

CELLS: dict[str, Any] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


@FAMILIES.register
class Config(PlainConfig):
    """Embedding, recurrent layers, head."""

    arch: Literal["rnn"] = "rnn"
    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    """The units of the layers; rnn: tanh of a weighted sum."""
    layers: Annotated[int, Ge(1)] = 2
    """Recurrent layers, one on the other."""
    width: Annotated[int, Ge(1)] = 256
    """Units of a layer, and width of the embedding."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of each layer's output that is dropped before the next one and before the head."""

    def build(self, vocab_size: int) -> RecurrentLM:
        """With torch's own initial values."""
        return RecurrentLM(self, vocab_size)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy (B, C) of the token that follows each one."""
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
        """What `bigtrain sample` continues a text by."""
        return self(batch["tokens"]).float()
