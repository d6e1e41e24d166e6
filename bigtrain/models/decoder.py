"""The decoder-only transformer of gpt2, llama and similar families: embedding, blocks, norm, head.

Shapes: B sequences, C tokens, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.config import TensorRole
from bigtrain.models.contract import Batch, Init, LossSum, Normal, Ones, Stage, Zeros
from bigtrain.models.decoder_config import GATED, DecoderConfig, RopeScaling
from bigtrain.models.flex import mask_of_documents
from bigtrain.models.layers import (
    MLP,
    Attention,
    Embedding,
    GatedMLP,
    LayerNorm,
    Linear,
    Mask,
    RMSNorm,
    local,
    rotary_frequencies,
    rotary_table,
)
from bigtrain.models.lora import adapt
from bigtrain.models.loss import chunked_cross_entropy
from bigtrain.models.random import dropout
from bigtrain.models.sums import by_sequence


def _norm(config: DecoderConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, config.norm_eps, float(config.norm_offset))
    return LayerNorm(config.width, config.norm_eps, bias=config.bias)


def _mlp(config: DecoderConfig) -> nn.Module:
    if config.mlp in GATED:
        return GatedMLP(config.width, config.hidden_width, config.mlp, bias=config.bias)
    return MLP(config.width, config.hidden_width, config.mlp, bias=config.bias)


def _score_width(config: DecoderConfig) -> float | None:
    """The width whose square root divides attention scores; None: that of a head.

    Under muP it is chosen so that scores are divided in proportion to the head's width, not to its square root.
    """
    if config.head_factor == 1:
        return config.score_width
    return (config.score_width or config.width_of_head) / config.head_factor


def _apply(norm: nn.Module | None, x: Tensor) -> Tensor:
    normalised: Tensor = x if norm is None else norm(x)
    return normalised


@dataclass(frozen=True)
class Shared:
    """Inputs that all blocks of one forward pass share; rotary tables stay in FP32."""

    rotary: tuple[Tensor, Tensor] | None
    mask: Mask | None
    local_rotary: tuple[Tensor, Tensor] | None
    """Rotary table of the layers with a sliding window; `local_mask` is their mask."""
    local_mask: Mask | None
    keys: Tensor | None
    sequence_positions: Tensor
    """int64 (C,), positions in their sequences of the tokens that this rank's residual stream holds."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `norm_at` moves the norm after the branch, or puts a norm before and after it. In a parallel block, attention and
    MLP both read the same normalised x.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.parallel = config.parallel_block
        self.windowed, self.rotary = layer in config.windowed_layers, layer in config.rotary_layers
        before, after = config.norm_at != "after", config.norm_at != "before"
        self.attention_norm = _norm(config) if before else None
        self.attention = Attention(
            config.width,
            config.heads,
            config.key_value_heads,
            config.width_of_head,
            bias=config.bias,
            qkv_bias=config.qkv_bias,
            qk_norm=partial(RMSNorm, eps=config.norm_eps, offset=float(config.norm_offset)) if config.qk_norm else None,
            qk_norm_over_heads=config.qk_norm_over == "heads",
            score_width=_score_width(config),
        )
        self.attention_output_norm = _norm(config) if after else None
        self.mlp_norm = _norm(config) if before and not self.parallel else None
        self.mlp = _mlp(config)
        self.mlp_output_norm = _norm(config) if after else None

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """Apply the block to x (B, C, W)."""
        rotary, mask = (shared.local_rotary, shared.local_mask) if self.windowed else (shared.rotary, shared.mask)
        normalised = _apply(self.attention_norm, x)
        branch = _apply(self.attention_output_norm, self.attention(normalised, rotary if self.rotary else None, mask))
        x = x + self._drop(branch, shared, 2 * self.layer + 1)
        branch = self.mlp(normalised if self.parallel else _apply(self.mlp_norm, x))
        return x + self._drop(_apply(self.mlp_output_norm, branch), shared, 2 * self.layer + 2)

    def _drop(self, branch: Tensor, shared: Shared, site: int) -> Tensor:
        positions = shared.sequence_positions
        return dropout(branch, self.dropout, shared.keys, site, self.training, positions=positions)


class SharedMatrices(Protocol):
    """Operations of a tensor-parallel group that the model needs; `parallel.tensor.TensorGroup` implements them."""

    def positions(self, count: int) -> slice:
        """The positions of a sequence of `count` tokens that this rank's residual stream holds."""
        ...

    def loss(self, hidden: Tensor, head: Tensor, rows: int, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of cross-entropies over the full sequences, and the losses that it sums, (B, ...).

        Args:
            hidden: This rank's residual stream.
            head: This rank's rows of the head.
            rows: Number of rows of the full head.
        """
        ...

    def logits(self, hidden: Tensor, head: Tensor, rows: int) -> Tensor:
        """The logits of the full sequences; the arguments are those of `loss`."""
        ...


class DecoderModel(nn.Module):
    """A decoder-only transformer (`contract.Decoder`, `contract.Splittable`, `contract.Staged`)."""

    tensor: SharedMatrices | None = None
    """The tensor-parallel group; None without tensor parallelism."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context = config, vocab_size, config.context
        self.compute_dtype = torch.float32
        self.stage = Stage(0, config.layers, config.layers)
        self.rows = rows = config.padded_vocab(vocab_size)
        self.embedding: Embedding | None = Embedding(rows, config.width)
        learned = config.positions == "learned"
        self.position_embedding = Embedding(config.position_count, config.width) if learned else None
        # A dict by layer index, so that the layers of a pipeline stage keep their names.
        self.layers = nn.ModuleDict({str(layer): Block(config, layer) for layer in range(config.layers)})
        self.norm: nn.Module | None = _norm(config)
        self.head = None if config.tied else Linear(config.width, rows, bias=config.head_bias)
        if config.adapter is not None:
            adapt(self, config.adapter)

    def keep(self, stage: Stage) -> None:
        """Drop all modules that the stage does not hold; a tied embedding stays on the first and the last stage."""
        self.stage = stage
        self.layers = nn.ModuleDict({str(layer): self.layers[str(layer)] for layer in range(stage.first, stage.last)})
        if not stage.is_first:
            self.position_embedding = None
            if not (stage.is_last and self.config.tied):
                self.embedding = None
        if not stage.is_last:
            self.norm = self.head = None

    def forward(self, batch: Batch) -> LossSum:
        """Weighted sum of the cross-entropies of `targets`, in nats, and sum of `weights`.

        Args:
            batch: tokens and targets, int64 (B, C); weights, FP32 (B, C); keys, int64 (B,), needed for dropout;
                documents and positions (B, C), if attention is limited to documents. Under context parallelism, C
                counts this rank's tokens, sequence_positions int64 (C,) holds their positions in the sequences, and
                mask (see `layers.attend`) replaces documents.
        """
        return self._sums(self.hidden(batch), batch)

    def forward_stage(self, x: Tensor | None, batch: Batch) -> Tensor | LossSum:
        """Run this stage's part of `forward`.

        Args:
            x: The residual stream that the previous stage returned, (B, C, W) or this rank's slice; None on the first.
        """
        x = self._blocks(x, batch)
        return self._sums(self._normalised(x), batch) if self.stage.is_last else x

    def stream_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape (B, C, W) of the residual stream, where C counts the positions that this rank holds."""
        sequences, positions = batch["tokens"].shape
        mine = slice(0, positions) if self.tensor is None else self.tensor.positions(positions)
        return sequences, mine.stop - mine.start, self.config.width

    def logits(self, batch: Batch) -> Tensor:
        """FP32 logits (B, C, vocabulary), without the padding of the vocabulary."""
        hidden, head = self._read_by_head(self.hidden(batch))
        if self.tensor is None:
            logits = F.linear(hidden, head.to(hidden.dtype))
        else:
            logits = self.tensor.logits(hidden, head, self.rows)
        return logits[..., : self.vocab_size].float()

    def hidden(self, batch: Batch) -> Tensor:
        """The normalised residual stream (B, C, W) that the head reads, or this rank's slice, in `compute_dtype`."""
        return self._normalised(self._blocks(None, batch))

    def _blocks(self, x: Tensor | None, batch: Batch) -> Tensor:
        """The residual stream after this stage's layers.

        Args:
            x: The residual stream of the previous stage; None on the first stage.
        """
        tokens, keys = batch["tokens"], batch.get("keys")
        places = batch.get("sequence_positions")
        if places is None:
            places = torch.arange(tokens.shape[1], device=tokens.device)
        positions = batch.get("positions", places)
        mine = slice(0, None) if self.tensor is None else self.tensor.positions(tokens.shape[1])
        if x is None:
            x = self._embedded(tokens, positions[..., mine])
            x = dropout(x, self.config.dropout, keys, 0, self.training, positions=places[mine])
        shared = Shared(*self._for_attention(batch, positions), keys, places[mine])
        for layer in self.layers.values():
            x = layer(x, shared)
        return x

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert self.embedding is not None  # the first stage has it
        x: Tensor = self.embedding(tokens, self.compute_dtype)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.width * self.config.width_factor)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions, self.compute_dtype)
        return x

    def _normalised(self, x: Tensor) -> Tensor:
        assert self.norm is not None  # the last stage has it
        hidden: Tensor = self.norm(x)
        return hidden

    def _sums(self, hidden: Tensor, batch: Batch) -> LossSum:
        hidden, head = self._read_by_head(hidden)
        targets, weights = batch["targets"], batch["weights"]
        if self.tensor is None:
            loss, losses = chunked_cross_entropy(hidden, head, targets, weights)
        else:
            loss, losses = self.tensor.loss(hidden, head, self.rows, targets, weights)
        return LossSum(loss, weights.sum(), by_sequence(losses, weights))

    def _read_by_head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the head, and this rank's rows of the head's matrix.

        A bias becomes an additional column of the matrix, and the input gets an additional channel of ones. muP's
        factor of the logits multiplies the input, so that it does not scale the bias.
        """
        head = local(self.output_weight)
        if self.config.width_factor != 1:
            hidden = hidden * self.config.width_factor
        bias = None if self.head is None else self.head.bias
        if bias is None:
            return hidden, head
        ones = torch.ones_like(hidden[..., :1])
        return torch.cat((hidden, ones), dim=-1), torch.cat((head, local(bias)[:, None].to(head.dtype)), dim=-1)

    @property
    def output_weight(self) -> Tensor:
        """The head's matrix (padded vocabulary, W); the token embedding if the head is tied."""
        module = self.embedding if self.head is None else self.head
        assert module is not None  # the last stage has it
        return module.weight

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The transformer blocks, in order."""
        return [(f"layers.{layer}", block) for layer, block in self.layers.items()]

    def tensor_plan(self) -> dict[str, TensorRole]:
        """See `decoder_config.TENSOR_PLAN`."""
        return self.config.tensor_plan()

    def initialisers(self) -> dict[str, Init]:
        """GPT-2's rule, which is used for Llama shapes too.

        Weights are normal with std `init_std`; biases are zero. In the last layer of each branch, the std is divided by
        sqrt(2 * layers), because that many branches add up in the residual stream (Radford et al. 2019, section 2.3).
        Learned positions use `init_std` too, as in transformers and nanoGPT; GPT-2's own code uses 0.01. Under muP,
        the std of the blocks' matrices is scaled (see mup.py).
        """
        std, adapter = self.config.init_std, self.config.adapter
        hidden = std * math.sqrt(self.config.width_factor)
        branch_end = Normal(hidden / math.sqrt(2 * self.config.layers))
        rules: dict[str, Init] = {}
        for name, parameter in self.named_parameters():
            if adapter is not None and adapter.is_own(name):
                rules[name] = adapter.initialiser(name.rpartition(".")[2], tuple(parameter.shape))
            elif name.endswith(".bias"):
                rules[name] = Zeros()
            elif parameter.ndim == 1:
                rules[name] = Zeros() if self.config.norm_offset else Ones()
            elif name.endswith(("attention.output.weight", "mlp.down.weight")):
                rules[name] = branch_end
            else:
                rules[name] = Normal(hidden if self.config.is_hidden(name) else std)
        return rules

    def _for_attention(
        self, batch: Batch, positions: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, Mask | None, tuple[Tensor, Tensor] | None, Mask | None]:
        """Rotary table and mask of layers with full attention, then of layers with a sliding window."""
        config = self.config
        options: dict[str, Any] = {"head_width": config.width_of_head, "dtype": self.compute_dtype}
        mask: Mask | None = batch.get("mask")
        if "documents" in batch:
            mask = mask_of_documents(batch["documents"], **options)
        local_mask: Mask | None = batch.get("local_mask", mask)
        if config.window is not None and config.windowed_layers and "local_mask" not in batch:
            documents = batch.get("documents", torch.zeros_like(batch["tokens"]))
            local_mask = mask_of_documents(documents, window=config.window, **options)
        rotary = local_rotary = None
        if config.positions == "rotary":
            rotary = local_rotary = self._rotary(positions, config.rope_theta, config.rope_scaling)
            if config.rope_local_theta is not None:
                local_rotary = self._rotary(positions, config.rope_local_theta, None)
        return rotary, mask, local_rotary, local_mask

    def _rotary(self, positions: Tensor, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, Tensor]:
        return rotary_table(positions, rotary_frequencies(self.config.rotary_width, theta, scaling, positions.device))
