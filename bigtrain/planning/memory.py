"""The bytes that a rank holds: parameters, gradients, the optimizer's state, and what a block keeps for its backward.

What is gathered or computed for a moment (a block's whole parameters, the logits of a chunk) is not in here.

What a block keeps (`block_activation_bytes`)
---------------------------------------------
A token of the rank's own (sequences x context / cp), with width W, H heads and K key heads of width D, hidden width
F, e bytes a number, t = tp, s = t under sequence parallelism and 1 without. Derived from what autograd saves for
each operator of `models.decoder.Block`:

- norm before each branch: its input, e W/s, and the root mean square (LayerNorm: mean and deviation). torch's CPU
  kernel of RMSNorm keeps its input and the normalised input in FP32 instead, 8 W/s. A norm of queries or keys
  likewise, of H D/t and K D/t numbers with as many roots as heads.
- what the columns multiply: e W for each branch, the whole sequence at any tp: it is gathered once, and not again.
- queries, keys and values, rotated: e (H + 2K) D/t. A rotation keeps nothing but its table, one for all blocks.
- attention: its result, e H D/t, which the output matrix reads too, and log sum exp, 4 H/t. No scores.
- output and down matrices: nothing of their own; their sums over ranks are read by nothing that multiplies.
- GELU: its input and result, 2 e F/t; ReLU: its result, e F/t; SwiGLU: gate, its SiLU, up, their product, 4 e F/t.
- dropout: a mask of one byte, W/s, for each branch.

Under cp all of this falls by cp, but for what attention keeps (`parallel.context`):

- ulysses: keys are repeated to cp heads where tp leaves fewer, max(K/t, cp) in place of K/t; and the output matrix
  reads what comes back from the other ranks, not attention's result: e H D/t more.
- all_gather: keys and values of the full sequence, cp times as many; and the output matrix reads the two chunks
  joined, e H D/t more. Without documents CUDA's kernel makes the causal mask itself, the CPU's keeps one, of e
  bytes a pair.

A mask of documents is one for all blocks, of one byte for each pair of query and key; each attention makes of it a
mask in the dtype of the queries and keeps that: e bytes for each pair of a query that the rank's heads ask and a
key: C x C a sequence, under all_gather (2 cp + 1) (C / 2 cp)^2. That is quadratic in the context C, and no tp
lowers it.

selective keeps the block's input, e W/s; the sequence gathered for each branch, e W, under sequence parallelism;
each product, e (H + 2K) D/t, e F/t once or twice, and the outputs of the two branches, 2 e W/s; attention's result
and log sum exp; and what cp's ranks sent each other: queries, keys, values and results, or keys and values. full
keeps the block's input.
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
    """What an optimizer keeps of each parameter."""

    tensors: int = 2
    """FP32 tensors of the parameter's shape: Adam's two moments."""
    counts_steps: bool = True
    """Whether it counts each parameter's steps, in one FP32 number."""


ADAM = Moments()


@dataclass(frozen=True)
class Held:
    """Bytes of what a rank keeps from step to step; the gradients after the backward pass."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
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
    """The states of one rank, padding included.

    A rank holds the parameters of its stages (`LayoutConfig.split`), and of each split matrix the chunk of rows or
    columns that tp gives it. A tied head is on the first and on the last stage.

    fsdp: FP32 all three. dp_shard x cp gives each rank a chunk of the rows of that (of the columns, where tp's chunks
    of rows are not equal). For parameters and gradients every rank of a shard group allocates as much as the first,
    which has most; the optimizer's tensors have the rank's own size. A frozen parameter has neither.

    deepspeed: FP32 master weights, gradients and optimizer, and under ZeRO 1 to 3 another copy of the weights that
    compute, in `precision`. ZeRO 1 and 2 lay the parameters of a group (those that decay, those that do not) end to
    end, filled up to a multiple of twice the ranks, and give each rank an equal part; ZeRO 3 gives each rank an equal
    part of every parameter, rounded up, and keeps whole what has no more numbers than
    `stage3_param_persistence_threshold`. Offloaded states are counted too. ZeRO 1 has whole gradients until they are
    reduced; in BF16, where nothing is offloaded, it keeps them so (DeepSpeed's BF16_Optimizer).

    Args:
        sizes: The axes of all ranks.
        layout: How the blocks are split into stages.
        rank: Which one, among all.
        frozen: Patterns of `optimizer.frozen`; the engine fsdp alone has them.

    Raises:
        ValueError: An engine that does not run this model.
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
    """What one block of one micro-batch keeps from its forward pass to its backward pass, on one rank.

    Term by term: see the module's docstring.

    Args:
        model: Its `context` is that of the sequences.
        sequences: Of a micro-batch.
        layout: Its tp, sequence_parallel, cp and cp_kind count.
        documents: Whether attention stays inside documents (`data.document_mask`).
        place: On the cp axis: the first rank's first chunk under all_gather needs no mask.
        device: Whose kernels run.
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
    """Of a token: queries, keys, values, what they attend to, and log sum exp; masks are apart."""
    tp, cp = layout.tp, layout.cp
    heads, key_heads = model.heads // tp, model.key_value_heads // tp
    met, copies = 2 * key_heads, 1
    if cp > 1:
        copies = 2
        met = 2 * max(key_heads, cp) if layout.cp_kind == "ulysses" else 2 * key_heads * cp
    kept = heads + met + copies * heads
    if selective and cp > 1:
        # The products as well as what is made of them; joined chunks and gathered queries are not kept.
        ulysses = layout.cp_kind == "ulysses"
        kept = heads + 2 * key_heads + met + (3 if ulysses else 1) * heads
    return element * model.width_of_head * kept + FP32 * heads


def _masked_pairs(context: int, sequences: int, layout: LayoutConfig, documents: bool, place: int, device: str) -> int:
    """Pairs of query and key in the masks that one attention keeps."""
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
    """What a norm keeps of a token."""
    if kind == "layernorm":
        return element * width + 2 * (element if device == "cpu" else FP32)
    return (2 * FP32 if device == "cpu" else element) * width + FP32


def passes_in_flight(layout: LayoutConfig, place: int, micro_batches: int) -> int:
    """Passes of a micro-batch through a stage whose activations a rank keeps at once, at the most.

    Each keeps `block_activation_bytes` for each block of its stage. With p ranks of v stages each and m micro-batches,
    rank r of them:

    - 1f1b: min(p - r, m) (Narayanan et al. 2019).
    - interleaved: min((v - 1) p + 2 (p - 1 - r) + 1, m v), the forward passes before the first backward pass
      (Narayanan et al. 2021, section 2.2).
    - zero_bubble: min(v p, m v) on every rank. It begins with (v - 1) p + p - r forward passes, and a pass is let go
      when its weights' gradients are made, r passes later than the gradients of its input.

    Args:
        place: On the pp axis.
        micro_batches: Of a step.
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
