"""BERT's encoder with a head that classifies texts (Devlin et al. 2019, section 4.1).

The head reads the last block's output at [CLS], which precedes the text, or its mean over the text (`pooling`).
Parameters have the same names as in `bert`. So a run can start from the weights of a masked language model with

    init: {source: RUN, fresh: [start, classes, bias]}

or, if `first` is the vocabulary's own [CLS], from the weights of transformers' BertForMaskedLM with

    init: {source: DIR, fresh: [classes, bias]}

`start` is a parameter only with `pooling: cls` and without `first`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from pydantic import model_validator
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.families import bert
from bigtrain.models.huggingface import HfTensor
from bigtrain.models.loss import class_losses
from bigtrain.models.plain import Batch


@FAMILIES.register
class Config(bert.Config):
    """The keys of `bert`, and those of the classifier; `context` does not count [CLS]."""

    data_kind: ClassVar[DataKind] = "classified"
    counted: ClassVar[str] = "texts"
    loss_unit: ClassVar[str] = "nats per text"
    vocabulary_name: ClassVar[str] = "tokens.weight"
    later_keys: ClassVar[frozenset[str]] = bert.Config.later_keys | {"first"}
    hf_unused: ClassVar[str] = rf"{bert.Config.hf_unused}|cls\.predictions\.bias"

    arch: Literal["bert_classifier"] = "bert_classifier"  # type: ignore[assignment]
    vocabulary: Annotated[int, Ge(1)]
    """Size of the tokenizer's vocabulary."""
    first: Annotated[int, Ge(0)] | None = None
    """Id of the vocabulary's own [CLS] token, which takes the first position (BERT's own: 101); null: with `pooling:
    cls` a trained vector without a position, initialised from the seed, else no [CLS]."""
    pooling: Literal["cls", "mean"] = "cls"
    """What the head reads: the output at [CLS], or the mean over the text's tokens, [CLS] included (Reimers and
    Gurevych 2019). The mean suits weights that were trained without [CLS], such as those of `bert`."""

    @model_validator(mode="after")
    def _first_has_a_position(self) -> Config:
        if self.first is not None and self.position_count <= self.context:
            raise ValueError(f"max_positions {self.position_count} must exceed context {self.context}: [CLS] takes one")
        return self

    def build(self, vocab_size: int) -> BertClassifier:
        """The encoder and its head; `vocab_size` is the number of classes."""
        return BertClassifier(self, vocab_size)

    def has_vocabulary_rows(self, name: str) -> bool:
        """See `ModelConfig.has_vocabulary_rows`. `bias` has one row per class here."""
        return name == "tokens.weight" and super().has_vocabulary_rows(name)

    def hf_names(self) -> dict[str, HfTensor]:
        """Position in the state dict of transformers' BertForMaskedLM of each parameter that the two models share."""
        return {name: place for name, place in super().hf_names().items() if name != "bias"}

    def hf_config(self, rows: int) -> dict[str, Any]:
        """See `ModelConfig.hf_config`; it always raises ValueError."""
        raise ValueError(
            "its head reads [CLS] through the transform of the masked language model, which transformers does not have"
        )

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens (B, C), and the number of tokens of each text (B,), without padding."""
        return batch["tokens"], batch["lengths"]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        """The cross-entropy of each text, FP32 (B,), in nats."""
        return class_losses(output, batch)


class BertClassifier(bert.Bert):
    """BERT's encoder, and a linear head on the transformed output at [CLS], or on its mean over the text."""

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__(config, config.vocabulary)
        std = bert.initial_std(config.width)
        self.first, self.pooling = config.first, config.pooling
        self.has_cls = self.pooling == "cls" or self.first is not None
        self.start = None
        if self.has_cls and self.first is None:
            self.start = nn.Parameter(std * torch.randn(config.width))
        self.classes = nn.Parameter(std * torch.randn(classes, config.width))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, classes) for tokens (B, C); only the first `lengths` (B,) tokens are text, the rest is padding."""
        if self.first is not None:
            tokens = F.pad(tokens, (1, 0), value=self.first)
        x = self.embedded(tokens)
        if self.start is not None:
            x = torch.cat([self.start.expand(len(x), 1, -1), x], 1)
        # Attention needs at least one key; of an empty text without [CLS] it is the first padding.
        filled = (lengths + self.has_cls).clamp(min=1)[:, None]
        empty = torch.arange(x.shape[1], device=tokens.device) >= filled
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=empty)
        pooled = x[:, 0] if self.pooling == "cls" else x.masked_fill(empty[..., None], 0).sum(1) / filled
        return F.linear(self.transform(pooled), self.classes, self.bias)
