"""BERT's encoder with a head that tells the class of a text (Devlin et al. 2019, section 4.1).

A vector of its own, [CLS], stands before the text, and the class is read from what the last block makes of it. Names
are those of `bert`, so a run begins with the weights of a masked language model by

    init: {source: RUN, fresh: [start, classes, bias]}
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.families import bert
from bigtrain.models.loss import class_losses
from bigtrain.models.plain import Batch


@FAMILIES.register
class Config(bert.Config):
    """The keys of `bert`; `context` is the tokens of a text without [CLS]."""

    data_kind: ClassVar[DataKind] = "classified"

    arch: Literal["bert_classifier"] = "bert_classifier"  # type: ignore[assignment]
    vocabulary: Annotated[int, Ge(1)]
    """Entries of the tokenizer's vocabulary."""

    def build(self, vocab_size: int) -> BertClassifier:
        """The encoder and its head; `vocab_size` is the number of classes."""
        return BertClassifier(self, vocab_size)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens (B, C), and how many of them are the text's (B,)."""
        return batch["tokens"], batch["lengths"]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        """The cross-entropy of each text."""
        return class_losses(output, batch)


class BertClassifier(bert.Bert):
    """Logits of classes."""

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__(config, config.vocabulary)
        std = bert.initial_std(config.width)
        self.start = nn.Parameter(std * torch.randn(config.width))
        self.classes = nn.Parameter(std * torch.randn(classes, config.width))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, classes) of tokens (B, C), of which the first `lengths` (B,) are the text's."""
        start = self.start.expand(len(tokens), 1, -1)
        x = self.dropout(self.norm(torch.cat([start, self.embedded(tokens)], 1)))
        empty = torch.arange(x.shape[1], device=tokens.device) > lengths[:, None]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=empty)
        return F.linear(self.transform(x[:, 0]), self.classes, self.bias)
