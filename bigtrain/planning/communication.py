"""What the ranks of a run say to each other in one step: every collective, by kind, axes and bytes.

    terms = communication(model, vocabulary, sizes=sizes, layout=layout, engine=engine, precision="bf16", passes=4, ...)
    total(terms)[Collective("all_gather", ("dp_shard",), 1 << 20)]         # how often in a step

The list is exact, not an estimate: tests hold it against what real steps issue. Bytes are those of the whole that a
collective forms or divides, on one rank: an all-gather's output, a reduce-scatter's input, what an all-reduce sums, all
that an all-to-all takes in, a message. (A ring sends (n - 1) / n of an all-gather, a reduce-scatter or an all-to-all,
and twice that of an all-reduce.)

Names: B sequences of a pass, C tokens of each, W width, L blocks, m passes (micro-batches) of a step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from bigtrain.engines.config import FSDPConfig, Precision
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.planning.parts import Parts

Kind = Literal[
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "reduce", "gather", "scatter",
    "send", "recv", "barrier",
]  # fmt: skip

FP32, FP64 = 4, 8
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
"""Of a number in the matmuls and the residual stream."""


@dataclass(frozen=True, order=True)
class Collective:
    """One exchange, as one rank takes part in it."""

    kind: Kind
    axes: tuple[str, ...]
    """The axes of the mesh that its group spans, outermost first, without those of one rank."""
    bytes: int
    """Of the whole, as in the module's docstring."""


@dataclass(frozen=True)
class Term:
    """A collective, how often a step issues it, and why."""

    collective: Collective
    count: int
    why: str


@dataclass(frozen=True)
class Passes:
    """The micro-batches of a rank's step, all of one shape."""

    count: int
    sequences: int
    context: int

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.sequences * self.context


def total(terms: Iterable[Term]) -> Counter[Collective]:
    """How often a step issues each collective."""
    counts: Counter[Collective] = Counter()
    for term in terms:
        counts[term.collective] += term.count
    return counts


def communication(
    model: DecoderConfig,
    vocab_size: int,
    *,
    sizes: Mesh,
    layout: LayoutConfig,
    engine: FSDPConfig,
    precision: Precision,
    passes: Passes,
    rank: int = 0,
) -> list[Term]:
    """The collectives of one training step of the fsdp engine on a rank.

    Args:
        model: A decoder's shape.
        vocab_size: Entries of the vocabulary, before padding.
        sizes: The axes of all ranks.
        layout: The techniques' choices.
        engine: Recompute.
        precision: Of the matmuls.
        passes: The micro-batches.
        rank: Which one: parts that do not divide evenly are smaller on the last ranks.
    """
    step = _Step(model, vocab_size, sizes, layout, engine, precision, passes, rank)
    return [term for term in step.terms() if term.count]


class _Step:
    """One step of one rank."""

    def __init__(
        self,
        model: DecoderConfig,
        vocab_size: int,
        sizes: Mesh,
        layout: LayoutConfig,
        engine: FSDPConfig,
        precision: Precision,
        passes: Passes,
        rank: int,
    ) -> None:
        self.model, self.sizes, self.layout, self.engine, self.passes = model, sizes, layout, engine, passes
        self.rows = model.padded_vocab(vocab_size)
        self.number = BYTES[precision]
        self.parts = Parts.of(model, vocab_size, sizes, layout, rank)
        self.sharded = sizes.gradient_parallel > 1

    def terms(self) -> Iterator[Term]:
        """All of them."""
        yield from self._sharding()
        if self.sizes.tp > 1:
            yield from self._tensor()
        if self.sizes.world_size > 1:
            yield self._term("all_reduce", self._axes(*_ALL), 4 * FP64, 1, "loss, weight, square norm, votes")

    def _sharding(self) -> Iterator[Term]:
        """ZeRO-3 (Rajbhandari et al. 2020), as FSDP2 does it, with what needs no second gather left as it is.

        A block is gathered for its forward and again for its backward pass; the last one stays between the two, and the
        first one stays from its backward to its next forward pass. What is in no block (embedding, last norm, head)
        stays for the whole step. Each pass reduces its gradients, so that none lies whole on a rank.
        """
        shards, replicas = self._axes("dp_shard", "cp"), self._axes("dp_replicate")
        m = self.passes.count
        for place, (name, parameters) in enumerate([("root", self.parts.root), *self.parts.blocks]):
            padded = sum(parameter.padded_elements(self.parts.shards) for parameter in parameters)
            gathers = 1 if name == "root" else self._gathers(place - 1, len(self.parts.blocks))
            if shards:
                why = f"parameters of {name}, {'once' if name == 'root' else 'for forward and backward passes'}"
                yield self._term("all_gather", shards, padded * self.number, gathers, why)
                yield self._term("reduce_scatter", shards, padded * FP32, m, f"gradients of {name}, each pass")
            if replicas:
                # ZeRO + replicas (HSDP): what the shards have summed, over the replicas, once (Zhao et al. 2023).
                part = padded // self.parts.shards * FP32
                yield self._term("all_reduce", replicas, part, 1, f"gradients of {name}, after the last pass")

    def _gathers(self, block: int, blocks: int) -> int:
        m = self.passes.count
        forward = 1 if block == 0 else m
        backward = 0 if block == blocks - 1 else m
        return forward + backward

    def _tensor(self) -> Iterator[Term]:
        """Tensor parallelism (Shoeybi et al. 2019), and sequence parallelism (Korthikanti et al. 2022)."""
        axes, m, blocks = ("tp",), self.passes.count, self.model.layers
        stream = self.passes.tokens * self.model.width * self.number
        again = blocks if self.engine.recompute == "full" else 0
        if self.layout.sequence_parallel:
            gathers, scatters = 4 * blocks + 2 * again, 4 * blocks + again * self._leaves_again()
            yield self._term("all_gather", axes, stream, gathers * m, "into columns; gradients into rows")
            yield self._term("reduce_scatter", axes, stream, scatters * m, "out of rows; gradients out of columns")
            yield self._term("reduce_scatter", axes, stream, m, "rows of the embedding")
            yield self._term("all_gather", axes, stream, m, "gradients of the embedding's rows")
        else:
            sums = 4 * blocks + again * self._leaves_again()
            yield self._term("all_reduce", axes, stream, sums * m, "out of rows; gradients out of columns")
            yield self._term("all_reduce", axes, stream, m, "rows of the embedding")
        yield from self._loss(axes, stream)
        partial = sum(parameter.own_elements for parameter in self.parts.partial)
        if partial:
            yield self._term("all_reduce", axes, partial * FP32, 1, "gradients of what met a part of the activations")

    def _leaves_again(self) -> int:
        """How many of a block's two sums its recomputation repeats: it ends where nothing more is kept."""
        return 2 if self.model.dropout else 1

    def _loss(self, axes: tuple[str, ...], stream: int) -> Iterator[Term]:
        m, tokens = self.passes.count, self.passes.tokens
        if self.layout.loss_parallel:
            if self.layout.sequence_parallel:
                yield self._term("all_gather", axes, stream, m, "the last norm's output, into the head's rows")
                yield self._term("reduce_scatter", axes, stream, m, "its gradients")
            else:
                yield self._term("all_reduce", axes, stream, m, "gradients of the last norm's output")
            yield self._term("all_reduce", axes, tokens * FP32, m, "highest logit of each token")
            yield self._term("all_reduce", axes, 2 * tokens * FP32, m, "sums of exponentials, and the target's logit")
            return
        shares = math.ceil(self.rows / self.sizes.tp) * self.sizes.tp
        head = shares * self.model.width * (self.number if self.sharded else FP32)
        yield self._term("all_gather", axes, head, m, "rows of the head")
        if self.layout.sequence_parallel:
            yield self._term("reduce_scatter", axes, head, m, "their gradients")
            yield self._term("all_reduce", axes, FP32, m, "losses of the slices of the sequence")

    def _axes(self, *names: str) -> tuple[str, ...]:
        return tuple(name for name in _ALL if name in names and getattr(self.sizes, name) > 1)

    def _term(self, kind: Kind, axes: tuple[str, ...], size: int, count: int, why: str) -> Term:
        return Term(Collective(kind, axes, size), count, why)


_ALL = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
