"""The shape of a decoder-only transformer, without torch: keys, checks, parameter and FLOP counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import model_validator

from bigtrain.config import Section
from bigtrain.models.config import BlockCosts, Flops, ModelConfig, TensorRole

if TYPE_CHECKING:
    from bigtrain.models.decoder import DecoderModel

Positive = Annotated[int, Ge(1)]

TENSOR_PLAN: dict[str, TensorRole] = {
    "embedding.weight": "vocab",
    "head.weight": "vocab",
    "layers.*.attention.query.*": "column",
    "layers.*.attention.key.*": "column",
    "layers.*.attention.value.*": "column",
    "layers.*.attention.query_norm.*": "heads",
    "layers.*.attention.key_norm.*": "heads",
    "layers.*.attention.output.weight": "row",
    "layers.*.mlp.gate.*": "column",
    "layers.*.mlp.up.*": "column",
    "layers.*.mlp.down.weight": "row",
    "*": "sequence",
}
"""Heads, the MLP's channels and the vocabulary are split; all else is whole. The first pattern that matches counts."""


class RopeScaling(Section):
    """Llama 3.1's stretching of rotary wavelengths to a longer context (after its reference code)."""

    factor: Annotated[float, Ge(1)] = 8.0
    """By how much wavelengths longer than the original context are stretched."""
    low_freq_factor: Annotated[float, Gt(0)] = 1.0
    """Wavelengths over original_context / low_freq_factor are stretched in full."""
    high_freq_factor: Annotated[float, Gt(0)] = 4.0
    """Wavelengths under original_context / high_freq_factor are kept; between the two, interpolated."""
    original_context: Positive = 8192
    """Context before the stretching, in tokens."""

    @model_validator(mode="after")
    def _bands_are_ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be greater than low_freq_factor")
        return self


class DecoderConfig(ModelConfig):
    """A pre-norm decoder-only transformer; a family gives the defaults of its shape."""

    takes_documents: ClassVar[bool] = True

    layers: Positive
    """Transformer blocks."""
    width: Positive
    """Width of the residual stream."""
    heads: Positive
    """Query heads."""
    context: Positive
    """Tokens of one training sequence."""
    kv_heads: Positive | None = None
    """Key and value heads (grouped-query attention, Ainslie et al. 2023); null: as many as query heads."""
    head_width: Positive | None = None
    """Width of one head; null: width / heads."""
    max_positions: Positive | None = None
    """Positions that the model has; null: as many as `context`."""
    mlp: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu"
    """Activation of the MLP; swiglu has a gate (Shazeer 2020)."""
    mlp_width: Positive | None = None
    """Hidden width of the MLP; null: 4 * width, or for swiglu 8/3 * width rounded up to a multiple of 256."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before each branch and before the head."""
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Added to the variance."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary (Su et al. 2021) or a learned table."""
    rope_theta: Annotated[float, Gt(1)] = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary wavelengths."""
    tied: bool = False
    """Whether the output head is the token embedding."""
    bias: bool = False
    """Whether linear layers and LayerNorms have a bias."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head (RMSNorm)."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Rate of dropout after the embedding and on each branch's output (not on attention weights)."""
    init_std: Annotated[float, Gt(0), Le(1)] = 0.02
    """Standard deviation of initial weights; in the branches' last layers divided by sqrt(2 * layers)."""
    vocab_multiple: Positive = 1
    """The vocabulary is padded up to a multiple of this; the padding is in the softmax, never in a sample."""

    @model_validator(mode="after")
    def _shape_is_possible(self) -> DecoderConfig:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}: or set head_width")
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.width_of_head % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.width_of_head}")
        if self.context > self.position_count:
            raise ValueError(
                f"sequence longer than positions: context {self.context} > max_positions {self.max_positions}"
            )
        if self.rope_scaling is not None and self.positions != "rotary":
            raise ValueError("rope_scaling needs positions: rotary")
        return self

    @property
    def key_value_heads(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def width_of_head(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def position_count(self) -> int:
        """Positions that the model has."""
        return self.max_positions or self.context

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 768) * 256 if self.mlp == "swiglu" else 4 * self.width

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the token embedding."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    def tensor_parallel_sizes(self) -> dict[str, int]:
        """Heads stay whole, and all queries of a key's group with it."""
        return {"heads": self.heads, "kv_heads": self.key_value_heads, "mlp_width": self.hidden_width}

    def context_parallel_heads(self) -> tuple[int, int]:
        """All layers alike."""
        return self.heads, self.key_value_heads

    def block_costs(self, vocab_size: int) -> BlockCosts:
        """By matmul FLOPs, and for the embedding, which has none, by parameters up to those of one block.

        The first stage keeps the activations of the most micro-batches, so what it holds weighs too: Llama 3
        (Dubey et al. 2024, section 3.3.2) takes one block from the first stage and one from the last.
        """
        parameters = self._layer_matmul_parameters()
        block = 6 * parameters + 12 * self.heads * self.width_of_head * self.context
        head = 6 * self.padded_vocab(vocab_size) * self.width
        return BlockCosts(self.layers, min(1.0, self._embedding_parameters(vocab_size) / parameters), head / block)

    def build(self, vocab_size: int) -> DecoderModel:
        """The decoder on torch's current default device; its values are not yet drawn."""
        from bigtrain.models.decoder import DecoderModel

        return DecoderModel(self, vocab_size)

    def parameter_shapes(self, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by its qualified name, in the module's order; a tied head is the embedding."""
        rows, width = self.padded_vocab(vocab_size), self.width
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (rows, width)}
        if self.positions == "learned":
            shapes["position_embedding.weight"] = (self.position_count, width)
        for layer in range(self.layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes |= self._norm_shapes("norm", width)
        if not self.tied:
            shapes["head.weight"] = (rows, width)
        return shapes

    def tensor_plan(self) -> dict[str, TensorRole]:
        """See `TENSOR_PLAN`."""
        return TENSOR_PLAN

    def parameter_count(self, vocab_size: int) -> int:
        """Exact number of parameters, a tied head counted once."""
        return self._embedding_parameters(vocab_size) + self.parameter_count_without_embeddings(vocab_size)

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Parameters without the token and position embeddings; an untied head is counted."""
        norm = self.width * (2 if self.norm == "layernorm" and self.bias else 1)
        query, key_value = self.heads * self.width_of_head, self.key_value_heads * self.width_of_head
        per_layer = self._layer_matmul_parameters() + 2 * norm
        if self.bias:
            gate = self.hidden_width if self.mlp == "swiglu" else 0
            per_layer += query + 2 * key_value + self.width + self.hidden_width + gate + self.width
        if self.qk_norm:
            per_layer += 2 * self.width_of_head
        head = 0 if self.tied else self.padded_vocab(vocab_size) * self.width
        return self.layers * per_layer + norm + head

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Exact matmul FLOPs a token of a sequence of `context` tokens, forward and backward.

        6 for each parameter that multiplies (2 forward, 4 backward; the head counted, embedding look-ups
        not), plus 12 * layers * (heads * head_width) * context for attention: Chowdhery et al. 2022 (PaLM),
        appendix B; Narayanan et al. 2021, appendix. Recomputation is not counted.
        """
        head = self.padded_vocab(vocab_size) * self.width
        dense = 6 * (self.layers * self._layer_matmul_parameters() + head)
        attention = 12 * self.layers * self.heads * self.width_of_head * self.context
        return Flops(dense + attention, dense + attention // 2)

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        query, key_value = self.heads * self.width_of_head, self.key_value_heads * self.width_of_head
        linear = {"attention.query": (query, self.width), "attention.key": (key_value, self.width)}
        linear |= {"attention.value": (key_value, self.width), "attention.output": (self.width, query)}
        channels = {"mlp.gate": (self.hidden_width, self.width)} if self.mlp == "swiglu" else {}
        channels |= {"mlp.up": (self.hidden_width, self.width), "mlp.down": (self.width, self.hidden_width)}
        shapes = self._norm_shapes("attention_norm", self.width)
        shapes |= self._linear_shapes(linear)
        if self.qk_norm:
            shapes |= {f"attention.{which}_norm.weight": (self.width_of_head,) for which in ("query", "key")}
        return shapes | self._norm_shapes("mlp_norm", self.width) | self._linear_shapes(channels)

    def _linear_shapes(self, sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in sizes.items():
            shapes[f"{name}.weight"] = size
            if self.bias:
                shapes[f"{name}.bias"] = size[:1]
        return shapes

    def _norm_shapes(self, name: str, width: int) -> dict[str, tuple[int, ...]]:
        bias = {f"{name}.bias": (width,)} if self.norm == "layernorm" and self.bias else {}
        return {f"{name}.weight": (width,), **bias}

    def _embedding_parameters(self, vocab_size: int) -> int:
        learned = self.position_count * self.width if self.positions == "learned" else 0
        return self.padded_vocab(vocab_size) * self.width + learned

    def _layer_matmul_parameters(self) -> int:
        attention = self.width * self.width_of_head * (2 * self.heads + 2 * self.key_value_heads)
        return attention + self.width * self.hidden_width * (3 if self.mlp == "swiglu" else 2)
