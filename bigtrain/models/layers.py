"""The layers of a transformer.

Parameters are stored in FP32. Every layer casts its weights to the dtype of its input (`weight.to(x.dtype)`), so the
same code runs in every precision. The cast is free in FP32, and when FSDP has already cast the weights.

Layers compute on the part of a weight that this rank holds (`local`). Ranks that split a weight (tensor parallelism)
communicate through `enter` and `leave`, which `parallel.tensor` sets and which are None otherwise. Ranks that share
a sequence (context parallelism) communicate through `Attention.attend`, which `parallel.context` replaces.

Shapes: B sequences, C tokens, W width, H heads, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from bigtrain.models.decoder_config import RopeScaling


Exchange = Callable[[Tensor], Tensor]
"""A function that communicates activations (B, C, ...) between ranks."""


Mask = Union[Tensor, "BlockMask"]
"""A mask as `attend` accepts it: dense, or as blocks."""


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds: the full parameter, unless it is sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def cast(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """An optional parameter in the dtype of `x`."""
    return None if parameter is None else local(parameter).to(x.dtype)


class Branch(nn.Module):
    """A module that reads the residual stream (B, C, W) and returns what is added to it."""

    enter: Exchange | None = None
    """Under tensor parallelism: turns this rank's residual stream into the input of its column-split layers. It is
    applied once for all layers that read the stream."""


class Linear(nn.Linear):
    """x (..., in) -> (..., out), with the matmul in the dtype of x."""

    leave: Exchange | None = None
    """If ranks split the layer's inputs: sums the partial products of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        weight = local(self.weight).to(x.dtype)
        if self.leave is None:
            return F.linear(x, weight, cast(self.bias, x))
        total = self.leave(F.linear(x, weight))
        bias = cast(self.bias, x)
        return total if bias is None else total + bias

    def reset_parameters(self) -> None:
        """Nothing: `init.initialise` draws the values."""


class Embedding(nn.Embedding):
    """Indices (...) -> rows of the table (..., width)."""

    first_row: int = 0
    """Index of the first row that this rank holds."""
    leave: Exchange | None = None
    """If ranks split the rows: sums the look-ups of all ranks, which are zero for rows of other ranks."""

    def forward(self, indices: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        """Look up rows in `dtype`. The cast comes before the sum over ranks: a row plus zeros is exact in any dtype.

        On a CPU the look-up uses an FP32 table. The gradient of a row is the sum over all its occurrences, which a GPU
        accumulates in FP32 but a CPU in the table's dtype. In BF16, if FSDP has cast the table, the gradient of a
        frequent token would stop growing. Measured for 4,096 tokens of a vocabulary of 61: 6 % error, against 0.3 %.
        """
        table = local(self.weight)
        if table.device.type == "cpu":
            table = table.to(torch.promote_types(table.dtype, torch.float32))
        if self.leave is None:
            return F.embedding(indices, table).to(dtype)
        own = indices - self.first_row
        foreign = (own < 0) | (own >= table.shape[0])
        rows = F.embedding(own.masked_fill(foreign, 0), table)
        return self.leave(rows.to(dtype).masked_fill(foreign[..., None], 0.0))

    def reset_parameters(self) -> None:
        """Nothing: `init.initialise` draws the values."""


class RMSNorm(nn.Module):
    """RMS normalisation over the last dimension (Zhang and Sennrich 2019); statistics in FP32.

    Args:
        offset: Added to the weight; 1 in Gemma, whose norm weights start at zero.
    """

    def __init__(self, width: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; the result has the dtype of x."""
        weight = local(self.weight)
        weight = weight + self.offset if self.offset else weight
        return F.rms_norm(x, self.weight.shape, weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension (Ba et al. 2016); statistics in FP32."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; the result has the dtype of x."""
        return F.layer_norm(x, self.weight.shape, cast(self.weight, x), cast(self.bias, x), self.eps)


def rotary_frequencies(head_width: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Rotation angle per position of each channel pair, in radians: FP32 (head_width / 2,).

    Su et al. 2021, section 3.2.2. Long wavelengths are scaled as in Llama 3.1's reference code.
    """
    exponents = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, FP32 (..., C, 1, D / 2), for positions (..., C); the 1 stands for the heads."""
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channel pairs (i, i + R/2) of x (B, C, H, D), in FP32, in the channel order of Hugging Face's Llama.

    R, the number of rotated channels, is twice the last dimension of the tables. Channels from R on stay unchanged.
    """
    cos, sin = table
    rest = x[..., 2 * cos.shape[-1] :]
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).split(cos.shape[-1], dim=-1)[:2]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def document_mask(documents: Tensor, queries: Tensor | None = None, window: int | None = None) -> Tensor:
    """Boolean (B, 1, Q, C), true where the key is in the query's document and not later than the query.

    Args:
        documents: (B, C), index of each token's document inside its sequence.
        queries: int64 (Q,), the positions of the queries; None: all positions.
        window: Maximum number of tokens that a query sees, itself included; None: no limit.
    """
    places = torch.arange(documents.shape[1], device=documents.device)
    queries = places if queries is None else queries
    same = documents[:, queries, None] == documents[:, None, :]
    same = same.logical_and_(queries[:, None] >= places)
    return (same if window is None else same.logical_and_(queries[:, None] < places + window))[:, None]


Attend = Callable[[Tensor, Tensor, Tensor, Mask | None, bool], Tensor]
"""Type of `attend`, and of the function that replaces it under context parallelism."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None = None, causal: bool = True) -> Tensor:
    """Attention of queries (B, Q, H, D) over keys and values (B, K, H or a divisor of H, D).

    Args:
        mask: Boolean (B, 1, Q, K), true where attention is allowed, or a block mask (`flex.block_mask`). A mask
            replaces the causal mask.
        causal: Whether, without a mask, query i sees only the keys 0 to i.

    Returns:
        A tensor of the shape of `query`.
    """
    if mask is not None and not isinstance(mask, Tensor):
        from bigtrain.models.flex import attend_blocks

        return attend_blocks(query, key, value, mask)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return attended.transpose(1, 2)


class Attention(Branch):
    """Multi-head attention in which groups of query heads share a key and value head (Ainslie et al. 2023)."""

    attend: Attend = staticmethod(attend)
    """The attention function, applied to this rank's queries, keys and values; `parallel.context` replaces it."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        *,
        bias: bool = False,
        causal: bool = True,
        qkv_bias: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        qk_norm_over_heads: bool = False,
        score_width: float | None = None,
    ) -> None:
        """Create the layers.

        Args:
            qkv_bias: Whether the query, key and value layers have a bias even if `bias` is False.
            qk_norm: Creates a norm of the given width for queries or keys; None: they are not normalised.
            qk_norm_over_heads: Whether one norm covers all heads together; otherwise it covers each head separately.
            score_width: Scores are divided by its square root; None: by the square root of `head_width`.
        """
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_width = head_width or width // heads
        self.causal = causal
        self.query_scale = 1.0 if score_width is None else math.sqrt(self.head_width / score_width)
        self.query = Linear(width, self.heads * self.head_width, bias=bias or qkv_bias)
        self.key = Linear(width, self.kv_heads * self.head_width, bias=bias or qkv_bias)
        self.value = Linear(width, self.kv_heads * self.head_width, bias=bias or qkv_bias)
        self.output = Linear(self.heads * self.head_width, width, bias=bias)
        self.norm_joined = qk_norm_over_heads
        widths = [
            count * self.head_width if qk_norm_over_heads else self.head_width for count in (heads, self.kv_heads)
        ]
        self.query_norm, self.key_norm = (None if qk_norm is None else qk_norm(one) for one in widths)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Mask | None = None) -> Tensor:
        """Self-attention over x (B, C, W).

        Args:
            rotary: A `rotary_table` that broadcasts to (B, C, H, D), or None for no rotation.
            mask: The `mask` of `attend`.
        """
        if self.enter is not None:
            x = self.enter(x)
        query, key = self._queries_and_keys(x, rotary)
        value = self.value(x).unflatten(-1, (-1, self.head_width))
        output: Tensor = self.output(self.attend(query, key, value, mask, self.causal).flatten(2))
        return output

    def probabilities(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attention weights of the queries of x (B, C, W), FP32 (B, H, C, C): softmax(Q K^T / sqrt(D)).

        Vaswani et al. 2017, eq. 1. They serve for pictures only: `forward` never materialises them. The arguments are
        those of `forward`.
        """
        query, key = (heads.float().transpose(1, 2) for heads in self._queries_and_keys(x, rotary))
        scores = query @ key.repeat_interleave(self.heads // self.kv_heads, 1).mT / math.sqrt(self.head_width)
        if mask is None and self.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)

    def _queries_and_keys(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Queries (B, C, H, D) and keys (B, C, kv_heads, D), normalised, rotated and scaled for the scores."""
        query, key = self._normalised(self.query(x), self.query_norm), self._normalised(self.key(x), self.key_norm)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return (query if self.query_scale == 1 else query * self.query_scale), key

    def _normalised(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Split x (B, C, H * D) into heads (B, C, H, D), normalised if there is a norm."""
        split = (-1, self.head_width)
        if norm is None:
            return x.unflatten(-1, split)
        heads: Tensor = norm(x).unflatten(-1, split) if self.norm_joined else norm(x.unflatten(-1, split))
        return heads


class MLP(Branch):
    """down(activation(up(x))); x (..., W) -> (..., W)."""

    def __init__(self, width: int, hidden_width: int, activation: str = "gelu", *, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(width, hidden_width, bias=bias)
        self.down = Linear(hidden_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        if self.enter is not None:
            x = self.enter(x)
        hidden = self.up(x)
        if self.activation == "relu":
            hidden = F.relu(hidden)
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        output: Tensor = self.down(hidden)
        return output


class GatedMLP(Branch):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020); x (..., W) -> (..., W).

    Args:
        activation: "swiglu" for SiLU, "geglu" for the tanh approximation of GELU.
    """

    def __init__(self, width: int, hidden_width: int, activation: str = "swiglu", *, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.gate = Linear(width, hidden_width, bias=bias)
        self.up = Linear(width, hidden_width, bias=bias)
        self.down = Linear(hidden_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        if self.enter is not None:
            x = self.enter(x)
        gate = self.gate(x)
        gate = F.silu(gate) if self.activation == "swiglu" else F.gelu(gate, approximate="tanh")
        output: Tensor = self.down(gate * self.up(x))
        return output
