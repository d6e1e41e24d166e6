"""Memory that a rank holds: parameters, gradients, optimizer state, and the activations that a block keeps.

Temporary memory (a block's gathered parameters, the logits of a chunk) is not counted here; see estimate.py.

Activations of a block (`block_activation_bytes`)
-------------------------------------------------
Bytes per token on a rank, which has sequences x context / cp tokens. The model has width W, H heads and K key heads of
width D, and hidden width F; an element has e bytes; t = tp; s = t under sequence parallelism, else 1. The terms are
what autograd saves for each operator of `models.decoder.Block`:

- the norm before each branch: its input, e W/s, and the root mean square (LayerNorm: mean and deviation). torch's CPU
  kernel of RMSNorm instead keeps its input and the normalised input in FP32, 8 W/s. Norms of queries and keys keep the
  same for H D/t and K D/t elements, with one root mean square per head.
- the input of the column-split matmuls: e W for each branch. It is the full sequence at any tp, because it is gathered
  once and kept for the backward pass.
- queries, keys and values after the rotation: e (H + 2K) D/t. The rotation itself keeps only its table, which all
  blocks share.
- attention: its output, e H D/t, which is also the input of the output matrix, and log-sum-exp, 4 H/t; no scores.
- output and down matrices: nothing more. Only additions use their sums over ranks, and additions keep nothing.
- GELU: its input and output, 2 e F/t. ReLU: its output, e F/t. SwiGLU: gate, SiLU(gate), up, the product, 4 e F/t.
- dropout: a mask of one byte, W/s, for each branch.

cp divides all terms by cp, except for those of attention (`parallel.context`):

- ulysses: if tp leaves fewer than cp key heads, they are repeated: max(K/t, cp) instead of K/t. The output matrix reads
  the result of the second all-to-all instead of attention's output: e H D/t more.
- all_gather: keys and values are those of the full sequence, cp times as many. The output matrix reads the
  concatenation of the two chunks: e H D/t more. Without documents the CUDA kernel computes the causal mask itself; the
  CPU kernel keeps one, of e bytes per pair of query and key.

All blocks share one document mask, of one byte per pair of query and key. Each attention converts it to the dtype of
the queries and keeps the result: e bytes per pair. A rank has C x C pairs per sequence, or under all_gather
(2 cp + 1) (C / 2 cp)^2. This memory is quadratic in the context C, and tp does not reduce it.

Recompute selective keeps the block's input, e W/s; under sequence parallelism the gathered input of each branch, e W;
the output of each matmul: e (H + 2K) D/t, e F/t once or twice, and 2 e W/s for the two branches; attention's output and
log-sum-exp; and what cp ranks exchanged: queries, keys, values and outputs, or keys and values. Recompute full keeps
the block's input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from bigtrain.engines.config import EngineConfig, Precision
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.models.decoder_config import GATED, DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh, Recompute
from bigtrain.planning.parts import BYTES, FP32, Parameter, Parts, filled
from bigtrain.planning.zero import ALIGNED, PERSISTENT


class Moments(NamedTuple):
    """The state that an optimizer keeps of each parameter."""

    tensors: int = 2
    """Number of FP32 tensors of the parameter's shape; Adam's two moments."""
    counts_steps: bool = True
    """Whether the optimizer keeps a step count for each parameter, one FP32 value."""


ADAM = Moments()


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds between passes; gradients are those after the backward pass."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Sum of the three terms."""
        return self.parameters + self.gradients + self.optimizer


def held_bytes(
    model: DecoderConfig,
    vocab_size: int,
    *,
    engine: EngineConfig,
    sizes: Mesh,
    layout: LayoutConfig,
    rank: int = 0,
    precision: Precision = "fp32",
    moments: Moments = ADAM,
    frozen: Collection[str] = (),
) -> Held:
    """Bytes of parameters, gradients and optimizer state on one rank, including padding.

    A rank holds the parameters of its stages (`LayoutConfig.split`), and tp's chunk of rows or columns of each split
    matrix. A tied head is on the first and on the last stage.

    fsdp: all three are FP32. Each rank of dp_shard x cp has a chunk of the rows of its tp part (of the columns, if tp
    splits the rows unevenly). For parameters and gradients, every rank of a shard group allocates as much as the first
    rank, whose chunk is the largest. The optimizer's tensors have the size of the rank's own chunk. A frozen parameter
    has neither gradient nor optimizer state.

    deepspeed: master weights, gradients and optimizer state are FP32. ZeRO 1 to 3 also have a copy of the weights in
    `precision` for forward and backward. ZeRO 1 and 2 concatenate the parameters of a group (with or without weight
    decay), and pad it to a multiple of twice the ranks. Each rank gets an equal shard. ZeRO 3 gives each rank an equal
    shard of every parameter, rounded up. It keeps parameters of at most `stage3_param_persistence_threshold` elements
    unsharded too. Offloaded state is counted. ZeRO 1 has unsharded gradients until they are reduced. In BF16 without
    offload it keeps them unsharded (DeepSpeed's BF16_Optimizer).

    Args:
        sizes: Sizes of the mesh axes.
        layout: The section `layout`, which splits the blocks into stages.
        rank: The global rank.
        moments: The state that the optimizer keeps.
        frozen: Patterns of the frozen parameters; only the engine fsdp supports them.

    Raises:
        ValueError: The formulas do not cover the engine.
    """
    parts = Parts.of(model, vocab_size, sizes, layout, rank)
    if isinstance(engine, DeepSpeedConfig):
        return _zero(parts, engine, precision, moments)
    if not isinstance(engine, FSDPConfig):
        raise ValueError(f"the states under engine '{engine.name}' are not counted: use fsdp or deepspeed")
    trained = [one for one in parts.all if not any(fnmatchcase(one.name, pattern) for pattern in frozen)]
    own = FP32 * sum(parameter.own_elements for parameter in trained)
    return Held(
        _padded_bytes(parts.all, parts.shards),
        _padded_bytes(trained, parts.shards),
        moments.tensors * own + moments.counts_steps * FP32 * len(trained),
    )


def _padded_bytes(parameters: Iterable[Parameter], shards: int) -> int:
    return FP32 * sum(parameter.padded_elements(shards) // shards for parameter in parameters)


def _zero(parts: Parts, engine: DeepSpeedConfig, precision: Precision, moments: Moments) -> Held:
    ranks = parts.shards
    elements = [parameter.elements for parameter in parts.all]
    if engine.zero == 0:
        states = FP32 * sum(elements)
        return Held(states, states, moments.tensors * states + moments.counts_steps * FP32 * len(elements))
    groups = {
        decays: sum(one.elements for one in parts.all if (len(one.shape) >= 2) == decays) for decays in (True, False)
    }
    groups = {decays: size for decays, size in groups.items() if size}
    if engine.zero == 3:
        share = sum(filled(size, ranks) // ranks for size in elements)
        zero = engine.passthrough.get("zero_optimization", {})
        threshold = zero.get("stage3_param_persistence_threshold", PERSISTENT)
        computing = share + sum(size for size in elements if size <= threshold)
    else:
        computing = sum(filled(size, ALIGNED * ranks) for size in groups.values())
        share = computing // ranks
    stay_whole = engine.zero == 1 and precision == "bf16" and engine.offload == "none"
    return Held(
        BYTES[precision] * computing + FP32 * share,
        FP32 * (computing if stay_whole else share),
        FP32 * moments.tensors * share + moments.counts_steps * FP32 * len(groups),
    )


def block_activation_bytes(
    model: DecoderConfig,
    sequences: int,
    *,
    precision: Precision,
    recompute: Recompute = "none",
    layout: LayoutConfig | None = None,
    documents: bool = False,
    place: int = 1,
    device: Literal["cpu", "cuda"] = "cuda",
) -> int:
    """Bytes that one block keeps from the forward to the backward pass of one micro-batch, on one rank.

    The module's docstring lists the terms.

    Args:
        model: The section of a decoder; its `context` is the length of the sequences.
        sequences: Number of sequences of a micro-batch.
        layout: The section `layout`; tp, sequence_parallel, cp and cp_kind are used.
        documents: Whether attention is restricted to documents (`data.document_mask`).
        place: Index of the rank on the cp axis. Under all_gather the first chunk of rank 0 needs no mask.
        device: Type of the device whose kernels run.
    """
    layout = layout or LayoutConfig()
    element, tp = BYTES[precision], layout.tp
    stream = tp if layout.sequence_parallel else 1
    tokens, width = sequences * model.context // layout.cp, model.width
    if recompute == "full":
        return tokens * element * width // stream
    hidden = element * model.hidden_width // tp
    if recompute == "selective":
        matrices = 2 if model.mlp in GATED else 1
        gathered = 2 * element * width if stream > 1 else 0
        placeholders = 2 * element if tp > 1 else 0
        kept = gathered + _attention_bytes(model, element, layout, selective=True) + hidden * matrices
        return tokens * kept + tokens * 3 * element * width // stream + placeholders
    activation = {"swiglu": 4, "geglu": 4, "relu": 1}.get(model.mlp, 2) * hidden
    kept = 2 * element * width + _attention_bytes(model, element, layout) + activation
    if model.qk_norm:
        for heads in (model.heads // tp, model.key_value_heads // tp):
            kept += norm_bytes("rmsnorm", model.width_of_head, element, device) * heads
    per_position = 2 * norm_bytes(model.norm, width, element, device) + (2 * width if model.dropout else 0)
    pairs = _masked_pairs(model.context, sequences, layout, documents or model.window is not None, place, device)
    return tokens * kept + tokens // stream * per_position + element * pairs


def _attention_bytes(model: DecoderConfig, element: int, layout: LayoutConfig, *, selective: bool = False) -> int:
    """Bytes per token of queries, keys, values, attention's output and log-sum-exp, without masks."""
    tp, cp = layout.tp, layout.cp
    heads, key_heads = model.heads // tp, model.key_value_heads // tp
    met, copies = 2 * key_heads, 1
    if cp > 1:
        copies = 2
        met = 2 * max(key_heads, cp) if layout.cp_kind == "ulysses" else 2 * key_heads * cp
    kept = heads + met + copies * heads
    if selective and cp > 1:
        # The outputs of matmuls and of cp's collectives are kept; concatenated chunks are not.
        ulysses = layout.cp_kind == "ulysses"
        kept = heads + 2 * key_heads + met + (3 if ulysses else 1) * heads
    return element * model.width_of_head * kept + FP32 * heads


def _masked_pairs(context: int, sequences: int, layout: LayoutConfig, documents: bool, place: int, device: str) -> int:
    """Number of pairs of query and key in the masks that one attention keeps."""
    cp = layout.cp
    if cp == 1 or layout.cp_kind == "ulysses":
        return sequences * context * context if documents else 0
    chunk = context // (2 * cp)
    if documents:
        return sequences * (2 * cp + 1) * chunk * chunk
    if device == "cuda":
        return 0
    return (2 * cp + (place > 0)) * chunk * chunk


def norm_bytes(kind: str, width: int, element: int, device: str) -> int:
    """Bytes that a norm keeps of a token.

    Args:
        kind: "layernorm" or "rmsnorm".
        element: Bytes per element of the input.
        device: Type of the device, "cpu" or "cuda".
    """
    if kind == "layernorm":
        return element * width + 2 * (element if device == "cpu" else FP32)
    return (2 * FP32 if device == "cpu" else element) * width + FP32


def passes_in_flight(layout: LayoutConfig, place: int, micro_batches: int) -> int:
    """Largest number of forward passes through a stage whose activations a rank keeps at the same time.

    Each pass keeps `block_activation_bytes` for each block of its stage. With p ranks of v stages each, and m
    micro-batches, rank r keeps:

    - 1f1b: min(p - r, m) (Narayanan et al. 2019).
    - interleaved: min((v - 1) p + 2 (p - 1 - r) + 1, m v), the forward passes before the first backward pass
      (Narayanan et al. 2021, section 2.2).
    - zero_bubble: min(v p, m v) on every rank. Rank r begins with (v - 1) p + p - r forward passes. It frees a pass
      when the gradients of its weights are computed, r passes later than the gradients of its input.

    Args:
        place: Index of the rank on the pp axis.
        micro_batches: Number of micro-batches of a step.
    """
    ranks, stages = layout.pp, layout.pp_stages_per_rank
    if ranks == 1:
        return 1
    if layout.pp_schedule == "1f1b":
        most = ranks - place
    elif layout.pp_schedule == "interleaved":
        most = (stages - 1) * ranks + 2 * (ranks - 1 - place) + 1
    else:
        most = stages * ranks
    return min(most, micro_batches * stages)
