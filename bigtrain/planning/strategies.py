"""What the accelerate engine's strategies exchange in one step, by `communication`'s conventions.

A model of transformers has no bigtrain config: the formula uses its parameters' names and shapes. It was derived from
Accelerate 1.15 with torch 2.13 and DeepSpeed 0.19, and is tested against them.

ddp sums gradients after the last pass, in buckets that it fills in the order in which gradients come: one message where
a bucket holds all of them. fsdp2 gathers each unit for forward and backward of each pass, and reduces its gradients in
each pass. zero2 is DeepSpeed's stage 2 with all in FP32, whatever the matmuls are in.
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
"""What Accelerate sets where `passthrough.bucket_cap_mb` does not."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of parameters, by qualified names; tied ones once."""


@dataclass(frozen=True)
class Unit:
    """Modules whose parameters FSDP2 gathers together, by the beginnings of their names."""

    modules: tuple[str, ...]
    kept: bool = False
    """Whether they stay gathered from the forward to the backward pass: the last block, and what Accelerate makes of
    the last norm and the head (with a tied embedding). Parameters of no unit stay as well."""

    def holds(self, name: str) -> bool:
        """Whether a parameter is in one of the modules."""
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
    """The collectives of one training step on each of `ranks`.

    Args:
        shapes: The model's.
        engine: The strategy, and its settings.
        ranks: All of them.
        precision: Of the matmuls.
        passes: Micro-batches of a step.
        units: Under fsdp2: what is gathered together, but for the rest.

    Raises:
        ValueError: The gradients do not fit one bucket: where they are cut depends on the order in which they come.
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
    """Each parameter is filled up to rows that the ranks share equally."""
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
