"""What DeepSpeed's ZeRO exchanges in one step, by `communication`'s conventions (Rajbhandari et al. 2020).

Read off DeepSpeed 0.19 and held against it: stages 1 and 2 sum gradients with one all-reduce of a whole bucket, where
the paper's stage 2 needs a reduce-scatter alone, and stage 2 does so in each pass.
"""

from __future__ import annotations

import math

from bigtrain.engines.config import DeepSpeedConfig, Precision
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.planning.communication import BYTES, FP32, FP64, Collective, Kind, Passes, Term

BUCKET = 50_000_000
"""Elements that ZeRO 3 fetches ahead at once, a tenth of what is reduced at once: within it all goes in one message."""
PERSISTENT = 100_000
"""Parameters of fewer elements ZeRO 3 keeps whole, and gathers after the step, unless it is told otherwise."""
ALIGNED = 2
"""Flat groups are filled up to a multiple of this times the ranks."""
AXES = ("dp_shard",)


def zero(
    model: DecoderConfig, vocab_size: int, *, ranks: int, engine: DeepSpeedConfig, precision: Precision, passes: Passes
) -> list[Term]:
    """The collectives of one training step of the deepspeed engine, data parallel over `ranks`; equal on all of them.

    Raises:
        ValueError: The model does not fit one of DeepSpeed's buckets: how it cuts larger ones is not stated here.
    """
    shapes = model.parameter_shapes(vocab_size)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    everything, number = sum(sizes.values()), BYTES[precision]
    if everything > BUCKET:
        raise ValueError(f"{everything} parameters do not fit one of DeepSpeed's buckets of {BUCKET}")
    if ranks == 1:
        return []
    terms = [_term("all_reduce", 3 * FP64, 1, "loss, weight, votes")]
    if engine.zero == 3:
        return terms + _stage_3(sizes, ranks, engine, number, passes.count)
    reductions = passes.count if engine.zero == 2 else 1
    terms.append(_term("all_reduce", everything * FP32, reductions, "gradients"))
    if engine.zero == 0:
        return terms
    for matrices, which in ((True, "matrices"), (False, "vectors")):
        flat = sum(sizes[name] for name, shape in shapes.items() if (len(shape) > 1) is matrices)
        whole = _filled(flat, ALIGNED * ranks)
        terms.append(_term("all_gather", whole * number, 1, f"updated parameters: {which}"))
    if engine.zero == 2 or precision == "fp32":
        terms.append(_term("all_reduce", FP32, 2, "gradient norm"))
    if engine.zero == 2 and precision == "bf16":
        terms.append(_term("all_reduce", 1, 1, "whether a gradient is infinite"))
    return terms


def _stage_3(sizes: dict[str, int], ranks: int, engine: DeepSpeedConfig, number: int, passes: int) -> list[Term]:
    settings = engine.passthrough.get("zero_optimization", {})
    limit = settings.get("stage3_param_persistence_threshold", PERSISTENT)
    filled = {name: _filled(size, ranks) for name, size in sizes.items()}
    terms = [
        _term("reduce_scatter", sum(filled.values()) * FP32, passes, "gradients, each pass"),
        _term("all_reduce", FP64, 2, "gradient norm; whether it is finite"),
    ]
    in_blocks = 0
    in_root = 0
    for name, size in sizes.items():
        if size <= limit:
            terms.append(_term("all_gather", filled[name] * number, 1, f"{name}, kept whole, after its update"))
        elif name.startswith("layers."):
            in_blocks += filled[name]
        else:
            in_root += filled[name]
    for elements, which in ((in_root, "what is in no block"), (in_blocks, "all blocks, fetched ahead")):
        terms += [_term("all_gather", elements * number, passes, which)] if elements else []
    return terms


def _filled(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple


def _term(kind: Kind, size: int, count: int, why: str) -> Term:
    return Term(Collective(kind, AXES, size), count, why)
