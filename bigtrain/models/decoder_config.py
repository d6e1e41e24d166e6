"""Config of a decoder-only transformer: keys, checks, parameter and FLOP counts. Does not import torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import model_validator

from bigtrain.config import Section
from bigtrain.models.adapter import ADAPTERS, TARGETS, AdapterConfig
from bigtrain.models.config import BlockCosts, Flops, ModelConfig, TensorRole
from bigtrain.models.mup import MupConfig

if TYPE_CHECKING:
    from torch import Tensor

    from bigtrain.models.decoder import DecoderModel

Positive = Annotated[int, Ge(1)]
Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"]
GATED: frozenset[str] = frozenset(("swiglu", "geglu"))
"""Activations that make the MLP gated."""

TENSOR_PLAN: dict[str, TensorRole] = {
    "embedding.weight": "vocab",
    "head.*": "vocab",
    "layers.*.attention.query.*": "column",
    "layers.*.attention.key.*": "column",
    "layers.*.attention.value.*": "column",
    "layers.*.attention.query_norm.*": "heads",
    "layers.*.attention.key_norm.*": "heads",
    "layers.*.attention.output.weight": "row",
    "layers.*.mlp.gate.*": "column",
    "layers.*.mlp.up.*": "column",
    "layers.*.mlp.down.weight": "row",
    "*": "whole",
}
"""Tensor parallelism splits heads, the MLP's hidden channels and the vocabulary; other parameters are not split. The
first matching pattern applies."""


class RopeScaling(Section):
    """Llama 3.1's scaling of rotary wavelengths to a longer context, as in its reference code."""

    factor: Annotated[float, Ge(1)] = 8.0
    """Factor by which wavelengths longer than the original context are scaled."""
    low_freq_factor: Annotated[float, Gt(0)] = 1.0
    """Wavelengths above original_context / low_freq_factor are scaled by the full factor."""
    high_freq_factor: Annotated[float, Gt(0)] = 4.0
    """Wavelengths below original_context / high_freq_factor are not scaled; between the two, the factor is
    interpolated."""
    original_context: Positive = 8192
    """Context before the scaling, in tokens."""

    @model_validator(mode="after")
    def _bands_are_ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be greater than low_freq_factor")
        return self


class DecoderConfig(ModelConfig):
    """Keys of a decoder-only transformer; each family sets the defaults of its own shape."""

    loss_unit: ClassVar[str] = "nats per token"
    takes_documents: ClassVar[bool] = True
    later_keys: ClassVar[frozenset[str]] = frozenset(
        [
            *("qkv_bias", "head_bias", "norm_at", "norm_offset", "qk_norm_over", "parallel_block", "sliding_window"),
            *("full_attention_every", "rope_local_theta", "rotary_part", "no_rotary_every", "score_width"),
            *("scale_embedding", "adapter", "mup"),
        ]
    )

    layers: Positive
    """Number of transformer blocks."""
    width: Positive
    """Width of the residual stream."""
    heads: Positive
    """Number of query heads."""
    context: Positive
    """Number of tokens of one training sequence."""
    kv_heads: Positive | None = None
    """Number of key and value heads (grouped-query attention, Ainslie et al. 2023); null: as many as query heads."""
    head_width: Positive | None = None
    """Width of one head; null: width / heads."""
    max_positions: Positive | None = None
    """Maximum sequence length of the model, in tokens; null: `context`."""
    mlp: Activation = "gelu"
    """Activation of the MLP; swiglu (SiLU) and geglu (GELU by tanh) make it gated (Shazeer 2020)."""
    mlp_width: Positive | None = None
    """Hidden width of the MLP; null: 4 * width, or if gated, 8/3 * width rounded up to a multiple of 256."""
    parallel_block: bool = False
    """Whether attention and MLP read the same normalised stream, and both are added to it (Wang and Komatsuzaki
    2021)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation of each branch, and before the head."""
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Added to the variance, or to the mean square of RMSNorm, for numerical stability."""
    norm_at: Literal["before", "after", "both"] = "before"
    """Where a branch is normalised: its input (before), its output (after, OLMo 2), or both (Gemma 3)."""
    norm_offset: bool = False
    """Whether an RMSNorm multiplies by 1 + weight (Gemma); its weights then start at zero."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary positions (Su et al. 2021), or a learned table."""
    rope_theta: Annotated[float, Gt(1)] = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary wavelengths to a longer context; null: none."""
    rope_local_theta: Annotated[float, Gt(1)] | None = None
    """Base of the rotary wavelengths in layers with a sliding window, without scaling; null: as in other layers."""
    rotary_part: Annotated[float, Gt(0), Le(1)] = 1.0
    """Fraction of a head's channels that is rotated, counted from the first channel."""
    no_rotary_every: Positive | None = None
    """Every n-th layer, counted from 1, has no rotary positions (SmolLM 3); null: all layers have them."""
    sliding_window: Positive | None = None
    """Number of tokens that a query sees, itself included (Beltagy et al. 2020); null: all up to itself."""
    full_attention_every: Positive | None = None
    """Every n-th layer, counted from 1, has no sliding window (Gemma 3); null: all layers have it."""
    score_width: Positive | None = None
    """Attention scores are divided by the square root of this; null: of the head's width."""
    scale_embedding: bool = False
    """Whether token embeddings are multiplied by the square root of the width (Gemma)."""
    tied: bool = False
    """Whether the output head shares the matrix of the token embedding."""
    bias: bool = False
    """Whether linear layers and LayerNorms have a bias; for the head, see `head_bias`."""
    qkv_bias: bool = False
    """Whether query, key and value projections have a bias even if `bias` is false (Qwen 2)."""
    head_bias: bool = False
    """Whether the output head has a bias."""
    qk_norm: bool = False
    """Whether queries and keys are normalised (RMSNorm)."""
    qk_norm_over: Literal["head", "heads"] = "head"
    """Whether `qk_norm` normalises each head separately, or all heads together (OLMo 2)."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout rate after the embedding and on each branch's output, but not on attention weights."""
    init_std: Annotated[float, Gt(0), Le(1)] = 0.02
    """Standard deviation of initial weights; divided by sqrt(2 * layers) in the last layer of each branch."""
    vocab_multiple: Positive = 1
    """The vocabulary is padded to a multiple of this. The softmax includes the padding; generated text never does."""
    adapter: Annotated[AdapterConfig, ADAPTERS] | None = None
    """Train small parameters beside frozen weights: {name: lora, rank: 8, alpha: 16, targets: [query, value]}; null:
    all weights are trained."""
    mup: MupConfig | None = None
    """The maximal update parametrization (mup.py), such as {base_width: 256}; null: standard parametrization."""

    @model_validator(mode="after")
    def _shape_is_possible(self) -> DecoderConfig:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}: change one of them, or set head_width"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.width_of_head % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.width_of_head}")
        if self.context > self.position_count:
            raise ValueError(
                f"sequence longer than positions: context {self.context} > max_positions {self.max_positions}"
            )
        needs = {
            "rope_scaling needs positions: rotary": self.rope_scaling is not None and self.positions != "rotary",
            "rotary_part needs positions: rotary": self.rotary_part != 1 and self.positions != "rotary",
            "no_rotary_every needs positions: rotary": bool(self.no_rotary_every) and self.positions != "rotary",
            "full_attention_every needs a sliding_window": bool(self.full_attention_every) and not self.sliding_window,
            "rope_local_theta needs a sliding_window": bool(self.rope_local_theta) and not self.sliding_window,
            f"an MLP of {self.mlp} has no gate: remove gate from adapter.targets": (
                self.adapter is not None and "gate" in self.adapter.targets and self.mlp not in GATED
            ),
            "norm_offset needs norm: rmsnorm": self.norm_offset and self.norm != "rmsnorm",
            "parallel_block needs norm_at: before": self.parallel_block and self.norm_at != "before",
            "head_bias needs tied: false": self.head_bias and self.tied,
            f"rotary_part {self.rotary_part} of a head's {self.width_of_head} channels is not an even number of "
            "channels": (self.rotary_width % 2 == 1 or self.rotary_width == 0),
        }
        for target in self.adapter.targets if self.adapter is not None else ():
            needs[f"adapter.targets has {target!r}, but a decoder's layers are {', '.join(TARGETS)}"] = (
                target not in TARGETS
            )
        for message, broken in needs.items():
            if broken:
                raise ValueError(message)
        return self

    @property
    def frozen(self) -> tuple[str, ...]:
        """See `ModelConfig.frozen`. All parameters except an adapter's are named weight or bias."""
        return () if self.adapter is None else ("*.weight", "*.bias")

    def has_vocabulary_rows(self, name: str) -> bool:
        """See `ModelConfig.has_vocabulary_rows`."""
        return name in ("embedding.weight", "head.weight", "head.bias")

    def adapted_weights(self) -> list[str]:
        """See `ModelConfig.adapted_weights`."""
        targets = self.adapter.targets if self.adapter is not None else ()
        ends = tuple(f".{target}.weight" for target in targets)
        return [name for name in self.hf_names() if name.startswith("layers.") and name.endswith(ends)]

    @property
    def follows_mup(self) -> bool:
        """See `ModelConfig.follows_mup`."""
        return self.mup is not None

    @property
    def width_factor(self) -> float:
        """muP's base width / width: the factor of the logits, and of the learning rate of hidden matrices."""
        return 1.0 if self.mup is None else self.mup.base_width / self.width

    @property
    def head_factor(self) -> float:
        """muP's base head width / head width; its square root is the factor of attention scores."""
        base = None if self.mup is None else self.mup.base_head_width
        return 1.0 if base is None else base / self.width_of_head

    def is_hidden(self, name: str) -> bool:
        """Whether a parameter, by its qualified name, is a matrix of a block; both its dimensions grow with the width.
        Parameters of an adapter are not included."""
        module, _, own = name.rpartition(".")
        return own == "weight" and module.rpartition(".")[2] in TARGETS

    def lr_scale(self, name: str) -> float:
        """See `ModelConfig.lr_scale`; an adapter's parameters are not scaled."""
        return self.width_factor if self.is_hidden(name) else 1.0

    def folded(self, name: str, value: Tensor) -> Tensor:
        """See `ModelConfig.folded`. Query layers, or the norms of queries, absorb the factor of attention scores; the
        norm before the head absorbs the factor of the logits. A scaled embedding absorbs its own factor, which a tied
        head then has too."""
        embedding = math.sqrt(self.width_factor) if self.scale_embedding else 1.0
        factor = 1.0
        if name.endswith(".attention.query_norm.weight" if self.qk_norm else (".query.weight", ".query.bias")):
            factor = math.sqrt(self.head_factor)
        elif name in ("norm.weight", "norm.bias"):
            factor = self.width_factor / (embedding if self.tied else 1.0)
        elif name == "embedding.weight":
            factor = embedding
        offset = float(self.norm_offset and value.ndim == 1)
        return value if factor == 1 else (value + offset) * factor - offset

    def is_adapter(self, name: str) -> bool:
        """See `ModelConfig.is_adapter`."""
        return self.adapter is not None and self.adapter.is_own(name)

    @property
    def rotary_width(self) -> int:
        """Number of channels of a head that are rotated."""
        return int(self.width_of_head * self.rotary_part)

    @property
    def window(self) -> int | None:
        """The sliding window, in tokens; None if no sequence is longer than it."""
        return None if self.sliding_window is None or self.sliding_window >= self.context else self.sliding_window

    @property
    def windowed_layers(self) -> frozenset[int]:
        """Indices, from 0, of the layers with the sliding window."""
        if self.sliding_window is None:
            return frozenset()
        every = self.full_attention_every
        return frozenset(layer for layer in range(self.layers) if every is None or (layer + 1) % every)

    @property
    def rotary_layers(self) -> frozenset[int]:
        """Indices, from 0, of the layers that rotate queries and keys."""
        every = self.no_rotary_every
        layers = range(self.layers) if self.positions == "rotary" else ()
        return frozenset(layer for layer in layers if every is None or (layer + 1) % every)

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def width_of_head(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def position_count(self) -> int:
        """Maximum sequence length of the model, in tokens."""
        return self.max_positions or self.context

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 768) * 256 if self.mlp in GATED else 4 * self.width

    def padded_vocab(self, vocab_size: int) -> int:
        """Number of rows of the token embedding."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    def tensor_parallel_sizes(self) -> dict[str, int]:
        """See `ModelConfig.tensor_parallel_sizes`. A rank holds complete heads, and with a key head all its queries.

        Raises:
            ValueError: `qk_norm_over` normalises all heads together.
        """
        if self.qk_norm and self.qk_norm_over == "heads":
            raise ValueError("layout.tp: model.qk_norm_over 'heads' normalises over the heads of all ranks: use tp 1")
        return {"heads": self.heads, "kv_heads": self.key_value_heads, "mlp_width": self.hidden_width}

    def context_parallel_heads(self) -> tuple[int, int]:
        """See `ModelConfig.context_parallel_heads`; all layers have equally many heads.

        Raises:
            ValueError: Sequences are longer than the sliding window.
        """
        if self.window is not None:
            raise ValueError(
                "layout.cp: ranks that share a sequence do not support a sliding window (model.sliding_window "
                f"{self.window}): use cp 1, or a model.context that is not longer"
            )
        return self.heads, self.key_value_heads

    def block_costs(self, vocab_size: int) -> BlockCosts:
        """See `ModelConfig.block_costs`. The costs of blocks and head are their matmul FLOPs.

        The embedding has no matmul; its cost is its parameter count relative to a block, at most 1. It matters because
        the first stage keeps the activations of the most micro-batches: Llama 3 (Dubey et al. 2024, section 3.3.2)
        removes one block from the first and one from the last stage.
        """
        parameters = self._layer_matmul_parameters()
        block = 6 * parameters + 12 * self.heads * self.width_of_head * self.context
        head = 6 * self.padded_vocab(vocab_size) * self.width
        return BlockCosts(self.layers, min(1.0, self._embedding_parameters(vocab_size) / parameters), head / block)

    def build(self, vocab_size: int) -> DecoderModel:
        """The decoder on torch's current default device; its parameters are not yet initialized."""
        from bigtrain.models.decoder import DecoderModel

        return DecoderModel(self, vocab_size)

    def parameter_shapes(self, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by qualified name, in the module's order; a tied head is not listed."""
        rows, width = self.padded_vocab(vocab_size), self.width
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (rows, width)}
        if self.positions == "learned":
            shapes["position_embedding.weight"] = (self.position_count, width)
        for layer in range(self.layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes |= self._norm_shapes("norm", width)
        if not self.tied:
            shapes["head.weight"] = (rows, width)
            shapes |= {"head.bias": (rows,)} if self.head_bias else {}
        return shapes

    def tensor_plan(self) -> dict[str, TensorRole]:
        """See `TENSOR_PLAN`."""
        return TENSOR_PLAN if self.adapter is None else {**self.adapter.tensor_plan(), **TENSOR_PLAN}

    def parameter_count(self, vocab_size: int) -> int:
        """Exact number of parameters; a tied head is counted once."""
        return self._embedding_parameters(vocab_size) + self.parameter_count_without_embeddings(vocab_size)

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Number of parameters without the token and position embeddings; an untied head is counted."""
        per_layer = sum(math.prod(shape) for shape in self._layer_shapes().values())
        norm = sum(math.prod(shape) for shape in self._norm_shapes("norm", self.width).values())
        head = 0 if self.tied else self.padded_vocab(vocab_size) * (self.width + self.head_bias)
        return self.layers * per_layer + norm + head

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Exact matmul FLOPs per token of a sequence of `context` tokens, forward and backward.

        They are 6 for each parameter of a matmul (2 forward, 4 backward), the head included, embedding look-ups not.
        Attention adds 12 * layers * (heads * head_width) * context (Chowdhery et al. 2022 (PaLM), appendix B; Narayanan
        et al. 2021, appendix). Recomputation is not counted. With an adapter, frozen parameters count 4, because they
        need no gradient of their own, and the adapter's count 6. `causal` counts only the query-key pairs inside a
        sliding window of w tokens: w * context - w^2 / 2 for each sequence.
        """
        head = self.padded_vocab(vocab_size) * self.width
        dense = 6 * (self.layers * self._layer_matmul_parameters() + head)
        if self.adapter is not None:
            layer = self._layer_shapes().items()
            own = sum(math.prod(shape) for name, shape in layer if self.adapter.is_own(name))
            dense = dense // 6 * 4 + 6 * self.layers * own
        pair = 12 * self.heads * self.width_of_head
        windowed = 0 if self.window is None else len(self.windowed_layers)
        causal = pair * (self.layers - windowed) * self.context // 2
        if self.window is not None:
            causal += pair * windowed * self.window * (2 * self.context - self.window) // (2 * self.context)
        return Flops(dense + self.layers * pair * self.context, dense + causal)

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        query, key_value = self.heads * self.width_of_head, self.key_value_heads * self.width_of_head
        shapes = self._branch_norms("attention")
        asking = {"query": (query, self.width), "key": (key_value, self.width), "value": (key_value, self.width)}
        shapes |= self._linear_shapes("attention", asking, self.bias or self.qkv_bias)
        shapes |= self._linear_shapes("attention", {"output": (self.width, query)}, self.bias)
        if self.qk_norm:
            sizes = (query, key_value) if self.qk_norm_over == "heads" else (self.width_of_head,) * 2
            norms = zip(("query", "key"), sizes, strict=True)
            shapes |= {f"attention.{which}_norm.weight": (size,) for which, size in norms}
        if not self.parallel_block:
            shapes |= self._branch_norms("mlp")
        channels = {"gate": (self.hidden_width, self.width)} if self.mlp in GATED else {}
        channels |= {"up": (self.hidden_width, self.width), "down": (self.width, self.hidden_width)}
        return shapes | self._linear_shapes("mlp", channels, self.bias)

    def _branch_norms(self, branch: str) -> dict[str, tuple[int, ...]]:
        before = self._norm_shapes(f"{branch}_norm", self.width) if self.norm_at != "after" else {}
        return before | (self._norm_shapes(f"{branch}_output_norm", self.width) if self.norm_at != "before" else {})

    def _linear_shapes(self, module: str, sizes: dict[str, tuple[int, int]], bias: bool) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in sizes.items():
            shapes[f"{module}.{name}.weight"] = size
            if bias:
                shapes[f"{module}.{name}.bias"] = size[:1]
            if self.adapter is not None and name in self.adapter.targets:
                shapes |= {f"{module}.{name}.{own}": shape for own, shape in self.adapter.shapes(size).items()}
        return shapes

    def _norm_shapes(self, name: str, width: int) -> dict[str, tuple[int, ...]]:
        bias = {f"{name}.bias": (width,)} if self.norm == "layernorm" and self.bias else {}
        return {f"{name}.weight": (width,), **bias}

    def _embedding_parameters(self, vocab_size: int) -> int:
        learned = self.position_count * self.width if self.positions == "learned" else 0
        return self.padded_vocab(vocab_size) * self.width + learned

    def _layer_matmul_parameters(self) -> int:
        attention = self.width * self.width_of_head * (2 * self.heads + 2 * self.key_value_heads)
        return attention + self.width * self.hidden_width * (3 if self.mlp in GATED else 2)
