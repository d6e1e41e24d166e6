"""The computation of a decoder in one pass of a micro-batch on one rank: matmuls, attention FLOPs and moved bytes.

The rank has T tokens (sequences x context / cp). The model has context C, width W, H heads and K key heads of width D,
and hidden width F; an element has e bytes; t = tp; s = t under sequence parallelism, else 1. The work of a block is:

- matmuls (m, n, k): (T, (H + 2K) D/t, W), (T, W, H D/t), (T, F/t, W) once or twice, (T, W, F/t).
- fused attention (Dao et al. 2022): 4 T C H D/t FLOPs forward and 2.5 times that backward; a causal kernel computes
  half of them. Attention that writes scores to memory: the same matmuls in full, which are memory-bound. In addition it
  moves bytes for each of the H/t x C pairs of a token: 11 forward (softmax and dropout read and write, a mask, a read)
  and 19 backward.
- bytes per token that pointwise kernels read and write: two norms, 4 e W/s; two residual sums with dropout's mask,
  6 e W/s; rotation, 2 e (H + K) D/t; activation function, 2 e F/t (SwiGLU 3 e F/t); copies around attention,
  4 e H D/t. If compiled, a norm and the kernel before it are fused.

The backward pass of pointwise kernels moves twice the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigtrain.models.decoder_config import GATED, DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Recompute
from bigtrain.planning.kernels import Matmul, Work, gradients

SCORE_BYTES_FORWARD, SCORE_BYTES_BACKWARD = 11, 19
LOSS_BYTES = {"chunked": (14, 6), "steps": (38, 22)}
"""Bytes that the loss reads and writes per logit, forward and backward."""
BLOCK_KERNELS = 22
"""Kernels that the host starts in a block's forward pass; the backward pass has twice as many."""


@dataclass(frozen=True)
class Software:
    """How a training program computes a block; the defaults describe bigtrain."""

    attention: Literal["fused", "scores"] = "fused"
    """fused: attention scores stay on the chip; scores: they are written to memory."""
    recomputes: Recompute | Literal["attention"] = "none"
    """What the backward pass recomputes; "attention": only scores and softmax (Korthikanti et al. 2022)."""
    merged: bool = False
    """Whether queries, keys and values are one matmul, and gate and up another one."""
    compiled: bool = False
    """Whether pointwise kernels are fused."""
    decomposed: bool = False
    """Whether norms and rotations are chains of FP32 kernels. They move 26 W/s more bytes per norm and 22 more per
    rotated element; torch has fused ones since 2.9."""
    products_again: float = 0.0
    """Share of a block's matmuls that selective recompute recomputes; bigtrain keeps all of their outputs."""
    causal_share: float = 0.5
    """Share of all pairs of query and key that fused attention computes."""
    loss: Literal["chunked", "steps"] = "chunked"
    """chunked: bigtrain's loss (`models.loss`), 14 bytes per logit forward and 6 backward. steps: one kernel each for
    FP32 logits, maximum, difference, exponential, sum and quotient, 38 and 22 bytes (Megatron-LM)."""


@dataclass(frozen=True)
class BlockWork:
    """The work of one block for one micro-batch."""

    forward: Work
    again: Work
    """Recompute before the backward pass."""
    backward: Work


def block_work(
    model: DecoderConfig, sequences: int, layout: LayoutConfig, software: Software, number: int
) -> BlockWork:
    """The work of a block for one micro-batch on one rank.

    Args:
        sequences: Number of sequences of the micro-batch.
        number: Bytes per element of the matmuls' dtype.
    """
    tp, stream = layout.tp, layout.tp if layout.sequence_parallel else 1
    tokens = sequences * model.context // layout.cp
    heads, keys = model.heads * model.width_of_head // tp, model.key_value_heads * model.width_of_head // tp
    width, hidden = model.width, model.hidden_width // tp
    gated = model.mlp in GATED
    entering: tuple[Matmul, ...]
    if software.merged:
        entering = (Matmul(tokens, heads + 2 * keys, width), Matmul(tokens, hidden * (2 if gated else 1), width))
    else:
        entering = (
            Matmul(tokens, heads, width),
            Matmul(tokens, keys, width, 2),
            Matmul(tokens, hidden, width, 2 if gated else 1),
        )
    products = (*entering, Matmul(tokens, width, heads), Matmul(tokens, width, hidden))
    core = _attention(model, tokens, sequences, layout, software)
    per_token = (2 * 4 + 2 * 6) * width / stream + (3 if gated else 2) * hidden * (1 if software.compiled else 1.5)
    if software.compiled:
        per_token -= 4 * width / stream
    if model.positions == "rotary":
        per_token += 2 * (heads + keys)
    if software.decomposed:
        per_token += 2 * 26 * width / stream + 22 * (heads + keys)
    if model.qk_norm:
        per_token += 2 * (heads + keys)
    per_token += 4 * heads
    kernels = BLOCK_KERNELS * 2 // 3 if software.compiled else BLOCK_KERNELS
    pointwise = Work(moved_bytes=tokens * per_token * number / 2, kernels=kernels)
    forward = Work(products, kernels=0) + core.forward + pointwise
    back = Work(moved_bytes=2 * pointwise.moved_bytes, kernels=2 * kernels)
    backward = Work(gradients(products)) + core.backward + back
    some = Work(products) if software.products_again else Work()
    again = {
        "none": Work(),
        "full": forward,
        "attention": core.forward,
        "selective": pointwise + some * software.products_again,
    }[software.recomputes]
    return BlockWork(forward, again, backward)


@dataclass(frozen=True)
class _Core:
    forward: Work
    backward: Work


def _attention(model: DecoderConfig, tokens: int, sequences: int, layout: LayoutConfig, software: Software) -> _Core:
    heads, width = model.heads // layout.tp, model.width_of_head
    pairs = tokens * model.context * heads
    flops = 4.0 * pairs * width
    if software.attention == "fused":
        one = flops * software.causal_share
        return _Core(Work(attention_flops=one), Work(attention_flops=2.5 * one))
    own, batch = model.context // layout.cp, sequences * heads
    scores, mixed = Matmul(own, model.context, width, batch), Matmul(own, width, model.context, batch)
    backward = (*scores.gradients, *mixed.gradients)
    return _Core(
        Work((scores, mixed), moved_bytes=SCORE_BYTES_FORWARD * pairs, kernels=4),
        Work(backward, moved_bytes=SCORE_BYTES_BACKWARD * pairs, kernels=8),
    )


def head_work(
    model: DecoderConfig, rows: int, sequences: int, layout: LayoutConfig, software: Software, number: int
) -> tuple[Work, Work]:
    """The work of the head and the loss for one micro-batch on one rank, forward and backward.

    Args:
        rows: Number of rows of the head on this rank.
    """
    tokens = sequences * model.context // layout.cp
    product = Matmul(tokens, rows, model.width)
    forward, backward = LOSS_BYTES[software.loss]
    return (
        Work((product,), moved_bytes=tokens * rows * forward, kernels=8),
        Work(product.gradients, moved_bytes=tokens * rows * backward, kernels=8),
    )


@dataclass(frozen=True)
class RankWork:
    """The work of one pass, for all pp ranks that have the same work."""

    blocks: int
    is_first: bool
    is_last: bool
    block: tuple[Work, Work]
    """Work of one block: forward, and backward with recompute."""
    ends: tuple[Work, Work]
    """Work of embedding and head: forward and backward."""
    places: tuple[int, ...]
    """Indices of these ranks on the pp axis."""


def rank_works(
    model: DecoderConfig, vocab_size: int, sequences: int, layout: LayoutConfig, software: Software, number: int
) -> list[RankWork]:
    """The work of all pp ranks, with ranks of equal work grouped; `LayoutConfig.split` gives each stage its blocks."""
    block = block_work(model, sequences, layout, software, number)
    of_block = block.forward, block.again + block.backward
    rows = -(-model.padded_vocab(vocab_size) // (layout.tp if layout.loss_parallel else 1))
    head = head_work(model, rows, sequences, layout, software, number)
    embedding = Work(moved_bytes=sequences * model.context // layout.cp * model.width * number * 2, kernels=3)
    split = layout.split(model.block_costs(vocab_size)) if layout.stages > 1 else (model.layers,)
    places: dict[tuple[int, bool, bool], list[int]] = {}
    for place in range(layout.pp):
        key = (sum(split[place :: layout.pp]), place == 0, place == layout.pp - 1)
        places.setdefault(key, []).append(place)
    found = []
    for (blocks, first, last), at in places.items():
        forward, backward = Work(), Work()
        if first:
            forward, backward = forward + embedding, backward + embedding
        if last:
            forward, backward = forward + head[0], backward + head[1]
        found.append(RankWork(blocks, first, last, of_block, (forward, backward), tuple(at)))
    return found
