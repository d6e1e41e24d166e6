"""BERT's encoder as a masked language model (Devlin et al. 2019): every token sees all others, some must be guessed.

Of the tokens `masked` are chosen in each pass; 80 % of these are replaced by a mask, 10 % by any token, and 10 % stay
(section 3.1 of the paper). The choice is keyed by sequence: it is the same at every layout, and in every evaluation.
Blocks normalise after the addition, and the head shares the matrix of the token embedding. There is no next-sentence
task, as in RoBERTa (Liu et al. 2019).
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from pydantic import model_validator
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES
from bigtrain.models.plain import Batch, LossSum, PlainConfig
from bigtrain.models.plain.encoder import encoder_layers
from bigtrain.models.sums import by_sequence

EPS = 1e-12
"""Of the norms, as in the paper's code."""
REPLACED, BY_ANY = 0.8, 0.1


@FAMILIES.register
class Config(PlainConfig):
    """An encoder of `layers` blocks over `context` tokens."""

    predicts_text: ClassVar[bool] = False

    arch: Literal["bert"] = "bert"
    layers: Annotated[int, Ge(1)] = 4
    """Transformer blocks."""
    width: Annotated[int, Ge(1)] = 128
    """Width of the residual stream; the MLP's hidden layer is four times as wide."""
    heads: Annotated[int, Ge(1)] = 4
    """Attention heads."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of embeddings, attention and branches."""
    masked: Annotated[float, Gt(0), Lt(1)] = 0.15
    """Share of the tokens that the loss counts."""

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Config:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self

    def build(self, vocab_size: int) -> Bert:
        """Weights from a normal, biases zero."""
        return Bert(self, vocab_size)

    def loss(self, output: tuple[Tensor, Tensor], batch: Batch) -> LossSum:
        """Cross-entropy of the chosen tokens."""
        logits, chosen = output
        weights = batch["weights"] * chosen
        losses = F.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none") * weights
        return LossSum(losses.sum(), weights.sum(), by_sequence(losses, weights))


def initial_std(width: int) -> float:
    """Standard deviation of initial weights: 0.02 at the paper's width of 768, and as one over the root of others.

    A narrow encoder that begins with 0.02 stays for thousands of steps at what the frequencies of tokens give.
    """
    return 0.02 * math.sqrt(768 / width)


class Bert(nn.Module):
    """Embeddings, blocks, and the head that guesses tokens."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        width, self.masked, self.vocabulary = config.width, config.masked, vocabulary
        self.tokens = nn.Embedding(vocabulary + 1, width)  # the last row is the mask
        self.positions = nn.Embedding(config.context, width)
        self.norm, self.dropout = nn.LayerNorm(width, EPS), nn.Dropout(config.dropout)
        options = {"dropout": config.dropout, "layer_norm_eps": EPS}
        self.layers = encoder_layers(config.layers, width, config.heads, **options)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, EPS))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=initial_std(width))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C, vocabulary) of tokens (B, C), and which of them were chosen."""
        chosen = torch.rand(tokens.shape, device=tokens.device) < self.masked
        fate = torch.rand(tokens.shape, device=tokens.device)
        anything = torch.randint(self.vocabulary, tokens.shape, device=tokens.device)
        shown = torch.where(fate < REPLACED, self.vocabulary, torch.where(fate < REPLACED + BY_ANY, anything, tokens))
        return self.guess(torch.where(chosen, shown, tokens)), chosen

    def guess(self, tokens: Tensor) -> Tensor:
        """Logits (B, C, vocabulary) for tokens (B, C), of which some are the mask: `vocabulary`."""
        x = self.dropout(self.norm(self.embedded(tokens)))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.transform(x), self.tokens.weight[: self.vocabulary], self.bias)

    def embedded(self, tokens: Tensor) -> Tensor:
        """What stands for tokens (B, C) and their places (B, C, width)."""
        embedded: Tensor = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return embedded
