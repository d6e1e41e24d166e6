"""Lists the collectives of one step of DeepSpeed's ZeRO (Rajbhandari et al. 2020); conventions: communication.py.

The formulas follow the code of DeepSpeed 0.19, and are tested against it.

- Stages 1 and 2 sum gradients with one all-reduce of a full bucket, although a reduce-scatter would suffice for the
  paper's stage 2. Stage 2 does so in each pass.
- Under tp, each rank applies some parameters to a part of the activations. In each pass the gradients of these are
  summed over tp one by one, before DeepSpeed reduces them.
- DeepSpeed's pipeline sends messages in the group of all ranks.
- ZeRO 3 keeps gathered parameters from the forward to the backward pass, also with recompute, if at most
  `stage3_max_reuse_distance` (1e9) elements are used in between. This always holds within one bucket.
- The first two steps differ: ZeRO 3 records the order of the parameters, and pipeline stages exchange shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from bigtrain.engines.config import Precision
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.planning.communication import (
    ALL,
    FP64,
    STEP_NUMBERS,
    Activations,
    Collective,
    Kind,
    Passes,
    Phase,
    Term,
    axes_of,
    ends_of,
)
from bigtrain.planning.parts import BYTES, FP32, Parameter, Parts, StageParts, filled

BUCKET = 50_000_000
"""Elements in ZeRO 3's prefetch bucket, a tenth of the reduce bucket. A smaller model needs one message for all."""
PERSISTENT = 100_000
"""Default of `stage3_param_persistence_threshold`: ZeRO 3 keeps parameters of at most so many elements unsharded, and
gathers them after the update."""
ALIGNED = 2
"""Flat groups are padded to a multiple of this number times the ranks."""


def zero(
    model: DecoderConfig,
    vocab_size: int,
    *,
    sizes: Mesh,
    layout: LayoutConfig,
    engine: DeepSpeedConfig,
    precision: Precision,
    passes: Passes,
    rank: int = 0,
    one_bucket: bool = True,
) -> list[Term]:
    """The collectives of one training step of the deepspeed engine on a rank.

    Args:
        model: The section of a decoder.
        vocab_size: Number of vocabulary entries, before padding.
        sizes: Sizes of the mesh axes.
        layout: The section `layout`.
        engine: The section `engine`, with ZeRO stage, recompute and thresholds.
        precision: Dtype of the matmuls.
        passes: The micro-batches of a rank.
        rank: The global rank.
        one_bucket: Whether to refuse a model of several buckets. If not, several buckets are counted as one: the total
            bytes are right, but the counts are too small.

    Raises:
        ValueError: `one_bucket` is true, and the model does not fit one of DeepSpeed's buckets.
    """
    (stage,) = Parts.of(model, vocab_size, sizes, layout, rank).stages
    parameters = [parameter for _, group in stage.groups for parameter in group]
    everything = sum(parameter.elements for parameter in parameters)
    if one_bucket and everything > BUCKET:
        raise ValueError(f"{everything} parameters do not fit one of DeepSpeed's buckets of {BUCKET}")
    # ZeRO 0 has no weights in `precision`: it casts the FP32 weights where they are used.
    number = BYTES[precision] if engine.zero else FP32
    activations = Activations(
        model,
        vocab_size,
        sizes=sizes,
        layout=layout,
        recompute=engine.recompute,
        precision=precision,
        passes=passes,
        head_number=number,
    )
    terms = [*activations.of(stage), *_in("reductions", _partial(parameters, layout, number, passes))]
    if sizes.pp > 1:
        everyone = axes_of(sizes, *ALL)
        terms += [*activations.neighbours(stage, everyone), *_in("once", _pipelined(model, stage, sizes))]
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    if engine.zero == 3:
        sharding = list(_stage_3(stage, sizes.data_parallel, engine, number, passes.count))
    else:
        sharding = stages_to_2(shapes, engine.zero, ranks=sizes.data_parallel, number=number, passes=passes.count)
    gathers = [term for term in sharding if term.collective.kind == "all_gather"]
    terms += [*_in("gathers", gathers), *_in("reductions", [term for term in sharding if term not in gathers])]
    votes = _term("all_reduce", axes_of(sizes, *ALL), STEP_NUMBERS * FP64, 1, "what a step sums")
    terms += _in("once", [*_norm(engine, precision, sizes), votes])
    return [term for term in terms if term.count and term.collective.axes and _is_held(term, sizes)]


def stages_to_2(
    shapes: Mapping[str, tuple[int, ...]], stage: int, *, ranks: int, number: int, passes: int
) -> list[Term]:
    """The collectives of gradients and updated parameters of ZeRO 0, 1 and 2.

    Args:
        shapes: Shapes of this rank's parameters, by name.
        stage: ZeRO stage.
        ranks: Number of data-parallel ranks.
        number: Bytes per element of the weights that are used in forward and backward.
        passes: Number of micro-batches of a step.
    """
    axes = ("dp_shard",)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    reductions = passes if stage == 2 else 1
    terms = [_term("all_reduce", axes, sum(sizes.values()) * FP32, reductions, "gradients")]
    if stage == 0:
        return terms
    for matrices, which in ((True, "matrices"), (False, "vectors")):
        flat = sum(sizes[name] for name, shape in shapes.items() if (len(shape) > 1) is matrices)
        whole = filled(flat, ALIGNED * ranks) * number
        terms.append(_term("all_gather", axes, whole, 1 if flat else 0, f"updated parameters: {which}"))
    return terms


def _stage_3(stage: StageParts, ranks: int, engine: DeepSpeedConfig, number: int, passes: int) -> Iterator[Term]:
    axes = ("dp_shard",)
    settings = engine.passthrough.get("zero_optimization", {})
    limit = settings.get("stage3_param_persistence_threshold", PERSISTENT)
    whole = sum(filled(parameter.elements, ranks) for _, group in stage.groups for parameter in group)
    yield _term("reduce_scatter", axes, whole * FP32, passes, "gradients, each pass")
    for _, group in stage.groups:
        for parameter in group:
            if parameter.elements <= limit:
                size = filled(parameter.elements, ranks) * number
                yield _term("all_gather", axes, size, 1, f"{parameter.name}, kept whole, after its update")
    spread = [
        sum(filled(one.elements, ranks) for one in group if one.elements > limit) * number for _, group in stage.groups
    ]
    root, blocks = spread[0], sum(spread[1:])
    yield _term("all_gather", axes, root, passes if root else 0, "what is in no block")
    yield _term("all_gather", axes, blocks, passes if blocks else 0, "all blocks, fetched ahead")


def _partial(parameters: list[Parameter], layout: LayoutConfig, number: int, passes: Passes) -> Iterator[Term]:
    met_a_part = {"heads", "whole"} if layout.sequence_parallel else {"heads"}
    for one in parameters:
        if one.role in met_a_part:
            yield _term("all_reduce", ("tp",), one.elements * number, passes.count, f"gradients of {one.name}")


def _norm(engine: DeepSpeedConfig, precision: Precision, sizes: Mesh) -> Iterator[Term]:
    """The all-reduces of DeepSpeed's gradient norm, over the data-parallel group and then the model-parallel group."""
    if engine.zero == 0 or (sizes.pp > 1 and precision == "fp32"):
        return
    groups = (("dp_shard",), axes_of(sizes, "pp", "tp"))
    if engine.zero == 1 and precision == "bf16":
        yield _term("all_reduce", groups[1], FP32, 1, "gradient norm")
        return
    # ZeRO 3 sums the norm in FP64, but with offload, where gradients are on the CPU, in FP32.
    size = FP64 if engine.zero == 3 and engine.offload == "none" else FP32
    for axes in groups:
        yield _term("all_reduce", axes, size, 2, "gradient norm; whether it is finite")
        if engine.zero == 2 and precision == "bf16":
            yield _term("all_reduce", axes, 1, 1, "whether a gradient is infinite")


def _pipelined(model: DecoderConfig, stage: StageParts, sizes: Mesh) -> Iterator[Term]:
    """The collectives of DeepSpeed's pipeline, without messages of the residual stream."""
    if model.tied and (stage.is_first or stage.is_last):
        (tied,) = (one.elements for one in stage.root if one.name == "embedding.weight")
        yield _term("all_reduce", ends_of(sizes), tied * FP32, 1, "gradients of the tied embedding's two copies")
    if stage.is_last:
        yield _term("all_reduce", ("dp_shard",), FP32, 1, "the loss that DeepSpeed reports")
    yield _term("broadcast", ("pp",), 2 * FP32, 1, "the loss that DeepSpeed reports, to the other stages")


def _in(phase: Phase, terms: Iterable[Term]) -> Iterator[Term]:
    return (replace(term, phase=phase) for term in terms)


def _is_held(term: Term, sizes: Mesh) -> bool:
    """Whether the group has more than one rank. DeepSpeed also reduces over groups of one rank, which moves nothing."""
    return all(axis not in ALL or getattr(sizes, axis) > 1 for axis in term.collective.axes)


def _term(kind: Kind, axes: tuple[str, ...], size: int, count: int, why: str) -> Term:
    return Term(Collective(kind, axes, size), count, why)
