"""BERT's encoder as a masked language model (Devlin et al. 2019): every token sees all others; some must be predicted.

Each forward pass chooses a share `masked` of the tokens. Of these, 80 % are replaced by the mask token, 10 % by a
random token, and 10 % stay unchanged (section 3.1 of the paper). The choice depends on the key of the sequence, so it
is the same in every layout and in every evaluation. Blocks normalise after the residual addition (post-norm), and the
head shares the matrix of the token embedding. As in RoBERTa (Liu et al. 2019), there is no next-sentence task. Weights
can be converted from and to transformers' BertForMaskedLM; the keys from `mask` on serve for BERT models that were
trained elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from pydantic import model_validator
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.models.config import FAMILIES
from bigtrain.models.huggingface import HfTensor, require
from bigtrain.models.plain import Batch, LossSum, PlainConfig
from bigtrain.models.plain.encoder import encoder_layers
from bigtrain.models.sums import by_sequence

EPS = 1e-12
"""Epsilon of LayerNorm, as in the paper's code."""
REPLACED, BY_ANY = 0.8, 0.1
NEVER = -1e4
"""Bias of a token that is never predicted: its probability is zero in every precision."""
HF_LAYER = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
"""Modules of a block, and their names in transformers."""
HF_OWN = {
    "norm": "bert.embeddings.LayerNorm",
    "transform.0": "cls.predictions.transform.dense",
    "transform.2": "cls.predictions.transform.LayerNorm",
}
HF_TYPES = "bert.embeddings.token_type_embeddings.weight"


@FAMILIES.register
class Config(PlainConfig):
    """An encoder of `layers` blocks over `context` tokens."""

    predicts_text: ClassVar[bool] = False
    counted: ClassVar[str] = "masked tokens"
    loss_unit: ClassVar[str] = "nats per masked token"
    vocabulary_name: ClassVar[str] = "bias"
    hides_tokens: ClassVar[bool] = True
    later_keys: ClassVar[frozenset[str]] = frozenset(["mask", "max_positions", "token_types"])
    hf_keys: ClassVar[Mapping[str, str]] = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "token_types": "type_vocab_size",
        "mask": "mask_token_id",
    }
    hf_unused: ClassVar[str] = (
        r"(bert\.)?(pooler\..*|embeddings\.position_ids)|cls\.(seq_relationship\..*|predictions\.decoder\..*)"
    )

    arch: Literal["bert"] = "bert"
    layers: Annotated[int, Ge(1)] = 4
    """Number of transformer blocks."""
    width: Annotated[int, Ge(1)] = 128
    """Width of the residual stream; the MLP's hidden layer is four times as wide."""
    heads: Annotated[int, Ge(1)] = 4
    """Number of attention heads."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout rate of embeddings, attention weights and branches."""
    masked: Annotated[float, Gt(0), Lt(1)] = 0.15
    """Share of the tokens that are chosen to be predicted; only they have a loss."""
    mask: Annotated[int, Ge(0)] | None = None
    """Id of the mask token, if the vocabulary has one (BERT's own [MASK]: 103); null: an additional token after the
    vocabulary."""
    max_positions: Annotated[int, Ge(1)] | None = None
    """Maximum sequence length of the model, in tokens; null: `context`."""
    token_types: Annotated[int, Ge(0)] = 0
    """Number of rows of the table that distinguishes the sentences of a pair (BERT: 2). The first row is added to every
    token; 0: no table."""

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Config:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.position_count < self.context:
            raise ValueError(f"max_positions {self.max_positions} is less than context {self.context}")
        return self

    @property
    def position_count(self) -> int:
        """Number of rows of the position table."""
        return self.context if self.max_positions is None else self.max_positions

    def build(self, vocab_size: int) -> Bert:
        """The model, with weights from a normal distribution (see `initial_std`) and biases zero."""
        return Bert(self, vocab_size)

    def loss(self, output: tuple[Tensor, Tensor], batch: Batch) -> LossSum:
        """Sum of the cross-entropies of the chosen tokens, in nats, and of their weights."""
        logits, chosen = output
        weights = batch["weights"] * chosen
        losses = F.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none") * weights
        return LossSum(losses.sum(), weights.sum(), by_sequence(losses, weights))

    def check_source(self, vocab_size: int) -> None:
        """See `ModelConfig.check_source`. Token ids set by keys must be in the vocabulary."""
        vocabulary = getattr(self, "vocabulary", vocab_size)
        for key in ("mask", "first"):
            id = getattr(self, key, None)
            if id is not None and id >= vocabulary:
                raise UserError(
                    f"model.{key} is {id}, but the vocabulary has {vocabulary} tokens, from 0",
                    f"model.{key}",
                    f"Pack the data with the tokenizer of the weights, or set model.{key} to null.",
                )

    def has_vocabulary_rows(self, name: str) -> bool:
        """See `ModelConfig.has_vocabulary_rows`. It is always False if the mask token is an additional row."""
        return self.mask is not None and name in ("tokens.weight", "bias")

    # Weights of transformers.

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' BertForMaskedLM, by qualified name."""
        names = {
            "tokens.weight": HfTensor("bert.embeddings.word_embeddings.weight"),
            "positions.weight": HfTensor("bert.embeddings.position_embeddings.weight"),
            "bias": HfTensor("cls.predictions.bias", padding=(NEVER,) if self.mask is None else ()),
        }
        if self.token_types:
            names["types.weight"] = HfTensor(HF_TYPES)
        for kind in ("weight", "bias"):
            names |= {f"{native}.{kind}": HfTensor(f"{hf}.{kind}") for native, hf in HF_OWN.items()}
            for number in range(self.layers):
                own, layer = f"layers.{number}.", f"bert.encoder.layer.{number}."
                query, *others = (f"{layer}attention.self.{name}.{kind}" for name in ("query", "key", "value"))
                names[f"{own}self_attn.in_proj_{kind}"] = HfTensor(query, below=tuple(others))
                names |= {f"{own}{native}.{kind}": HfTensor(f"{layer}{hf}.{kind}") for native, hf in HF_LAYER.items()}
        return names

    def hf_zeros(self) -> dict[str, tuple[int, ...]]:
        """See `ModelConfig.hf_zeros`. transformers always adds a token type; without `token_types` it is zero."""
        return {} if self.token_types else {HF_TYPES: (1, self.width)}

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a BertForMaskedLM. Only bigtrain reads `mask_token_id` and `mask_is_predicted`."""
        own_mask = self.mask is None
        return {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            "vocab_size": rows + own_mask,
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": self.position_count,
            "type_vocab_size": max(1, self.token_types),
            "hidden_act": "gelu",
            "layer_norm_eps": EPS,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            "pad_token_id": None,
            "tie_word_embeddings": True,
            "mask_token_id": rows if own_mask else self.mask,
            **({"mask_is_predicted": False} if own_mask else {}),
        }

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        width = hf.get("hidden_size", 768)
        off = dict.fromkeys(("is_decoder", "add_cross_attention"), False)
        only = {"hidden_act": "gelu", "layer_norm_eps": EPS, "position_embedding_type": "absolute"}
        require(hf, {**only, **off, "tie_word_embeddings": True, "intermediate_size": 4 * width})
        positions = hf.get("max_position_embeddings", 512)
        keys = {
            "arch": "bert",
            "layers": hf.get("num_hidden_layers", 12),
            "width": width,
            "heads": hf.get("num_attention_heads", 12),
            "context": positions,
            "max_positions": positions,
            "token_types": hf.get("type_vocab_size", 2),
            "dropout": hf.get("hidden_dropout_prob", 0.1),
        }
        if "mask_token_id" in hf:
            keys["mask"] = hf["mask_token_id"] if hf.get("mask_is_predicted", True) else None
        return keys


def initial_std(width: int) -> float:
    """Standard deviation of initial weights: 0.02 at the paper's width of 768, else scaled by 1 / sqrt(width).

    A narrow encoder initialised with 0.02 predicts only token frequencies for thousands of steps.
    """
    return 0.02 * math.sqrt(768 / width)


class Bert(nn.Module):
    """Embeddings, transformer blocks, and a head that predicts tokens."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        width, self.masked, self.vocabulary = config.width, config.masked, vocabulary
        self.mask = vocabulary if config.mask is None else config.mask
        self.tokens = nn.Embedding(vocabulary + (config.mask is None), width)
        self.positions = nn.Embedding(config.position_count, width)
        self.types = nn.Embedding(config.token_types, width) if config.token_types else None
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
        """Logits (B, C, vocabulary) for tokens (B, C), and a boolean (B, C), true for the chosen tokens."""
        chosen = torch.rand(tokens.shape, device=tokens.device) < self.masked
        fate = torch.rand(tokens.shape, device=tokens.device)
        anything = torch.randint(self.vocabulary, tokens.shape, device=tokens.device)
        shown = torch.where(fate < REPLACED, self.mask, torch.where(fate < REPLACED + BY_ANY, anything, tokens))
        return self.guess(torch.where(chosen, shown, tokens)), chosen

    def guess(self, tokens: Tensor) -> Tensor:
        """Logits (B, C, vocabulary) for tokens (B, C), some of which are the mask token."""
        x = self.dropout(self.norm(self.embedded(tokens)))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.transform(x), self.tokens.weight[: self.vocabulary], self.bias)

    def embedded(self, tokens: Tensor) -> Tensor:
        """Sum of token, position and type embeddings (B, C, width) of tokens (B, C)."""
        embedded: Tensor = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return embedded if self.types is None else embedded + self.types.weight[0]
