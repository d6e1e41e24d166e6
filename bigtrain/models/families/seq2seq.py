"""Sequence to sequence (Sutskever et al. 2014): an LSTM reads the source, another one generates the answer.

It is trained on samples of the kind `supervised`: the prompt is the source, the completion is the answer. As in the
paper, the source is read backwards unless `reverse: false` is set.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bigtrain.metrics import record_metric
from bigtrain.models.config import FAMILIES
from bigtrain.models.plain import Batch, LossSum, PlainConfig
from bigtrain.models.sums import by_sequence


@FAMILIES.register
class Config(PlainConfig):
    """Encoder and decoder of the same size; `context` is the number of tokens of source and answer together."""

    loss_unit: ClassVar[str] = "nats per token"

    arch: Literal["seq2seq"] = "seq2seq"
    layers: Annotated[int, Ge(1)] = 1
    """Number of LSTM layers of the encoder, and of the decoder."""
    width: Annotated[int, Ge(1)] = 128
    """Number of units of a layer, and width of the embedding."""
    reverse: bool = True
    """Whether the encoder reads the source backwards."""

    def build(self, vocab_size: int) -> Seq2Seq:
        """The model, initialised by torch's defaults."""
        return Seq2Seq(self, vocab_size)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens (B, C), and lengths of the sources (B,).

        The source ends with the first token whose target belongs to the answer.
        """
        return {"tokens": batch["tokens"], "source": 1 + (batch["weights"] > 0).int().argmax(1)}

    def loss(self, output: tuple[Tensor, Tensor], batch: Batch) -> LossSum:
        """Sum of the cross-entropies of the answers' tokens, in nats. Records the share of fully correct answers."""
        logits, places = output
        inside = places < batch["tokens"].shape[1]
        places = places.clamp(max=batch["tokens"].shape[1] - 1)
        targets, weights = batch["targets"].gather(1, places), batch["weights"].gather(1, places) * inside
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * weights
        right = ((logits.argmax(-1) == targets) | (weights == 0)).all(1)
        record_metric("answers", right.float(), weight=(weights > 0).any(1).float())
        return LossSum(losses.sum(), weights.sum(), by_sequence(losses, weights))


class Seq2Seq(nn.Module):
    """Two LSTMs; the decoder starts from the encoder's last state."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.reverse = config.reverse
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.encoder = nn.LSTM(config.width, config.width, config.layers, batch_first=True)
        self.decoder = nn.LSTM(config.width, config.width, config.layers, batch_first=True)
        self.head = nn.Linear(config.width, vocabulary)

    def forward(self, tokens: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C, vocabulary) of each decoder step, and the positions (B, C) in `tokens` that the steps read.

        Args:
            source: int64 (B,), lengths of the sources.
        """
        steps, last = torch.arange(tokens.shape[1], device=tokens.device), source[:, None] - 1
        read = (last - steps).clamp(min=0) if self.reverse else steps.expand_as(tokens)
        packed = pack_padded_sequence(
            self.embedding(tokens.gather(1, read)), source.cpu(), batch_first=True, enforce_sorted=False
        )
        _, state = self.encoder(packed)
        places = last + steps
        written = self.embedding(tokens.gather(1, places.clamp(max=tokens.shape[1] - 1)))
        return self.head(self.decoder(written, state)[0]), places
