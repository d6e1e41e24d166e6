"""The bytes that a rank holds: parameters, gradients, the optimizer's state, and what a block keeps for its backward.

What is gathered or computed for a moment (a block's whole parameters, the logits of a chunk) is not in here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from bigtrain.engines.config import DeepSpeedConfig, EngineConfig, FSDPConfig, Precision, Recompute
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh

FP32 = 4
ELEMENT: dict[Precision, int] = {"fp32": 4, "bf16": 2}
"""Bytes of a number in matmuls and in the residual stream."""


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
    mesh: Mesh,
    rank: int = 0,
    precision: Precision = "fp32",
    moments: Moments = ADAM,
) -> Held:
    """The states of one rank, padding included.

    fsdp: FP32 all three. tp gives each rank a chunk of the rows or columns of a split matrix, then dp_shard x cp a
    chunk of the rows of that (of the columns, where tp's chunks of rows are not equal). For parameters and gradients
    every rank of a shard group allocates as much as the first, which has most; the optimizer's tensors have the rank's
    own size. One rank alone pads nothing.

    deepspeed: FP32 master weights, gradients and optimizer, and under ZeRO 1 to 3 another copy of the weights that
    compute, in `precision`. ZeRO 1 and 2 lay the parameters of a group (those that decay, those that do not) end to
    end, filled up to a multiple of twice the ranks, and give each rank an equal part; ZeRO 3 gives each rank an equal
    part of every parameter, rounded up, and keeps whole what has no more numbers than
    `stage3_param_persistence_threshold`. Offloaded states are counted too.

    Raises:
        ValueError: An engine that does not run this model, or a mesh with stages.
    """
    if mesh.pp > 1:
        raise ValueError(f"the states of {mesh.pp} stages are not counted: give a mesh with pp 1")
    if isinstance(engine, DeepSpeedConfig):
        return _zero(model, vocab_size, engine, mesh, precision, moments)
    if not isinstance(engine, FSDPConfig):
        raise ValueError(f"the states under engine '{engine.name}' are not counted: use fsdp or deepspeed")
    places = mesh.coordinates(rank)
    ranks = mesh.dp_shard * mesh.cp
    sharded = mesh.data_parallel * mesh.cp > 1
    place = places["dp_shard"] * mesh.cp + places["cp"]
    padded, own, count = 0, 0, 0
    for shape, dim in _tensor_parts(model, vocab_size, mesh.tp, places["tp"]):
        rest = math.prod(shape) // shape[dim] if sharded else math.prod(shape)
        padded += _share(shape[dim], ranks) * rest if sharded else rest
        own += _chunk(shape[dim], ranks, place) * rest if sharded else rest
        count += 1
    steps = FP32 * count if moments.counts_steps else 0
    return Held(FP32 * padded, FP32 * padded, FP32 * moments.tensors * own + steps)


def _tensor_parts(model: DecoderConfig, vocab_size: int, tp: int, place: int) -> list[tuple[tuple[int, ...], int]]:
    """A tp rank's part of each parameter, and the dimension of it that dp shards: `parallel.shard` says which."""
    plan = model.tensor_plan()
    parts = []
    for name, shape in model.parameter_shapes(vocab_size).items():
        role = next(role for pattern, role in plan.items() if fnmatchcase(name, pattern))
        dim = {"column": 0, "vocab": 0, "row": 1}.get(role)
        if dim is None or tp == 1:
            parts.append((shape, 0))
            continue
        part = tuple(_chunk(size, tp, place) if at == dim else size for at, size in enumerate(shape))
        parts.append((part, 1 if dim == 0 and shape[0] % tp else 0))
    return parts


def _zero(
    model: DecoderConfig, vocab_size: int, engine: DeepSpeedConfig, mesh: Mesh, precision: Precision, moments: Moments
) -> Held:
    if mesh.data_parallel != mesh.world_size:
        raise ValueError("the states under ZeRO are counted for data parallelism alone: give a mesh with tp and cp 1")
    ranks = mesh.world_size
    shapes = model.parameter_shapes(vocab_size).values()
    sizes = [math.prod(shape) for shape in shapes]
    if engine.zero == 0:
        states = FP32 * sum(sizes)
        return Held(states, states, moments.tensors * states + moments.counts_steps * FP32 * len(sizes))
    groups = {
        decays: sum(math.prod(shape) for shape in shapes if (len(shape) >= 2) == decays) for decays in (True, False)
    }
    groups = {decays: size for decays, size in groups.items() if size}
    if engine.zero == 3:
        share = sum(_share(size, ranks) for size in sizes)
        zero = engine.passthrough.get("zero_optimization", {})
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        computing = share + sum(size for size in sizes if size <= threshold)
    else:
        padded = [_share(size, 2 * ranks) * 2 * ranks for size in groups.values()]
        share, computing = sum(padded) // ranks, sum(padded)
    steps = moments.counts_steps * FP32 * len(groups)
    return Held(ELEMENT[precision] * computing + FP32 * share, FP32 * share, FP32 * moments.tensors * share + steps)


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)


def _chunk(count: int, ranks: int, rank: int) -> int:
    """Entries of a rank, as `torch.chunk` deals them."""
    share = _share(count, ranks)
    return max(0, min(share, count - rank * share))


def block_activation_bytes(
    model: DecoderConfig,
    tokens: int,
    *,
    precision: Precision,
    recompute: Recompute = "none",
    layout: LayoutConfig | None = None,
    device: Literal["cpu", "cuda"] = "cuda",
) -> int:
    """What one block of one micro-batch keeps from its forward pass to its backward pass, on one rank.

    A token, with width W, H heads and K key heads of width D, hidden width F, e bytes a number, t = tp, s = t under
    sequence parallelism and 1 without. Derived from what autograd saves for each operator of `models.decoder.Block`:

    - norm before each branch: its input, e W/s, and the root mean square (LayerNorm: mean and deviation). torch's CPU
      kernel of RMSNorm keeps its input and the normalised input in FP32 instead, 8 W/s. A norm of queries or keys
      likewise, of H D/t and K D/t numbers with as many roots as heads.
    - what the columns multiply: e W for each branch, the whole sequence at any tp: it is gathered once, and not again.
    - queries, keys and values, rotated: e (H + 2K) D/t. A rotation keeps nothing but its table, one for all blocks.
    - attention: its result, e H D/t, which the output matrix reads too, and log sum exp, 4 H/t. No scores.
    - output and down matrices: nothing of their own; their sums over ranks are read by nothing that multiplies.
    - GELU: its input and result, 2 e F/t; ReLU: its result, e F/t; SwiGLU: gate, its SiLU, up, their product, 4 e F/t.
    - dropout: a mask of one byte, W/s, for each branch.

    selective keeps the block's input, e W/s; the sequence gathered for each branch, e W, under sequence parallelism;
    each product, e (H + 2K) D/t, e F/t once or twice, and the outputs of the two branches, 2 e W/s; and attention as
    above. full keeps the block's input. Under cp `tokens` are the rank's own, so all falls by cp.

    Args:
        tokens: Of a micro-batch on this rank: sequences x context / cp.
        layout: Its tp and sequence_parallel count.
        device: Whose kernels run.
    """
    layout = layout or LayoutConfig()
    element, tp = ELEMENT[precision], layout.tp
    stream = tp if layout.sequence_parallel else 1
    width, head = model.width, model.width_of_head
    query, key_value = model.heads * head // tp, model.key_value_heads * head // tp
    hidden = model.hidden_width // tp
    matrices = 2 if model.mlp == "swiglu" else 1
    if recompute == "full":
        return tokens * element * width // stream
    attention = element * query + FP32 * model.heads // tp
    projected = element * (query + 2 * key_value)
    if recompute == "selective":
        gathered = 2 * element * width if stream > 1 else 0
        placeholders = 2 * element if tp > 1 else 0
        kept = gathered + projected + attention + element * hidden * matrices
        return tokens * kept + tokens * 3 * element * width // stream + placeholders
    activation = {"swiglu": 4, "relu": 1}.get(model.mlp, 2) * element * hidden
    kept = 2 * element * width + projected + attention + activation
    if model.qk_norm:
        for heads in (model.heads // tp, model.key_value_heads // tp):
            kept += _norm_bytes("rmsnorm", head, element, device) * heads
    per_position = 2 * _norm_bytes(model.norm, width, element, device) + (2 * width if model.dropout else 0)
    return tokens * kept + tokens // stream * per_position


def _norm_bytes(kind: str, width: int, element: int, device: str) -> int:
    if kind == "layernorm":
        return element * width + 2 * (element if device == "cpu" else FP32)
    return (2 * FP32 if device == "cpu" else element) * width + FP32
