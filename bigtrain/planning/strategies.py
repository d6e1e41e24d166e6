"""Lists the collectives of one step of the accelerate engine's strategies, with the conventions of communication.py.

A model of transformers has no bigtrain config, so the formulas use the names and shapes of its parameters. They were
derived from Accelerate 1.15 with torch 2.13 and DeepSpeed 0.19, and are tested against them.

ddp sums gradients after the last pass, in buckets that it fills in the order in which gradients are computed. If one
bucket holds all gradients, this is one all-reduce. fsdp2 gathers each unit for forward and backward of each pass, and
reduce-scatters its gradients in each pass. zero2 is DeepSpeed's ZeRO-2 in FP32, for any dtype of the matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.engines.config import Precision
from bigtrain.planning.communication import FP64, STEP_NUMBERS, Collective, Kind, Term
from bigtrain.planning.parts import BYTES, FP32
from bigtrain.planning.zero import BUCKET, stages_to_2

AXES = ("dp_shard",)
DDP_BUCKET_MIB = 25
"""Bucket size that Accelerate uses if `passthrough.bucket_cap_mb` is not set."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of parameters by qualified name; tied parameters occur once."""


@dataclass(frozen=True)
class Unit:
    """Modules whose parameters FSDP2 gathers together."""

    modules: tuple[str, ...]
    """Qualified names of the modules."""
    kept: bool = False
    """Whether the unit stays gathered from the forward to the backward pass. The last block does, and so does
    Accelerate's unit of the last norm and the head (with a tied embedding). Parameters of no unit stay as well."""

    def holds(self, name: str) -> bool:
        """Whether a parameter of this name is in one of the modules."""
        return any(name.startswith(f"{module}.") for module in self.modules)


def strategy(
    shapes: Shapes,
    engine: AccelerateConfig,
    *,
    ranks: int,
    precision: Precision,
    passes: int,
    units: Sequence[Unit] = (),
) -> list[Term]:
    """The collectives of one training step of the accelerate engine on each rank.

    Args:
        shapes: Shapes of the model's parameters.
        engine: The section `engine`, with the strategy and its settings.
        ranks: World size.
        precision: Dtype of the matmuls.
        passes: Number of micro-batches of a step.
        units: Under fsdp2, the modules that are gathered together. All other parameters form one more unit.

    Raises:
        ValueError: The gradients do not fit one bucket of ddp or zero2. The formulas do not cover several buckets,
            whose content depends on the order in which gradients are computed.
    """
    if ranks == 1:
        return []
    terms = [_term("all_reduce", STEP_NUMBERS * FP64, 1, "what a step sums")]
    if engine.strategy == "fsdp2":
        return [*terms, *_fsdp2(shapes, units, ranks, BYTES[precision], passes)]
    everything = sum(map(math.prod, shapes.values()))
    ddp = engine.strategy == "ddp"
    bucket = engine.passthrough.get("bucket_cap_mb", DDP_BUCKET_MIB) * 2**20 // FP32 if ddp else BUCKET
    if everything > bucket:
        raise ValueError(f"{everything} parameters do not fit one bucket of {bucket}")
    if ddp:
        return [*terms, _term("all_reduce", everything * FP32, 1, "gradients, after the last pass")]
    terms += stages_to_2(shapes, 2, ranks=ranks, number=FP32, passes=passes)
    return [*terms, _term("all_reduce", FP32, 2, "gradient norm; whether it is finite")]


def _fsdp2(shapes: Shapes, units: Sequence[Unit], ranks: int, number: int, passes: int) -> Iterator[Term]:
    """The collectives of fsdp2. The rows of each parameter are padded to a multiple of the ranks."""
    filled = {name: math.prod((-(-rows // ranks) * ranks, *rest)) for name, (rows, *rest) in shapes.items()}
    left = dict(filled)
    for unit in units:
        elements = sum(left.pop(name) for name in filled if name in left and unit.holds(name))
        yield from _unit(elements, number, passes, ", ".join(unit.modules), unit.kept)
    if left:
        yield from _unit(sum(left.values()), number, passes, "what is in no unit", kept=True)


def _unit(elements: int, number: int, passes: int, name: str, kept: bool) -> Iterator[Term]:
    yield _term("all_gather", elements * number, passes * (1 if kept else 2), f"parameters of {name}")
    yield _term("reduce_scatter", elements * FP32, passes, f"gradients of {name}, each pass")


def _term(kind: Kind, size: int, count: int, why: str) -> Term:
    return Term(Collective(kind, AXES, size), count, why)
