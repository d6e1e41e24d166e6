"""What the ranks of a run exchange in one step: every collective, by kind, axes and bytes.

    terms = communication(model, vocabulary, sizes=sizes, layout=layout, engine=engine, precision="bf16", passes=4, ...)
    total(terms)[Collective("all_gather", ("dp_shard",), 1 << 20)]         # how often in a step

The list is exact, not an estimate: tests hold it against what real steps issue. Bytes are those of the full buffer on
one rank: an all-gather's output, a reduce-scatter's input, what an all-reduce sums, an all-to-all's input, a message.
(A ring sends (n - 1) / n of an all-gather, a reduce-scatter or an all-to-all, and twice that of an all-reduce.)

Names: B sequences of a pass, C tokens of each, W width, L blocks, m passes (micro-batches) of a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from bigtrain.engines.config import Precision
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.models.chunks import chunk_tokens
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh, Recompute
from bigtrain.planning.parts import BYTES, FP32, Parts, StageParts, chunk, filled

Kind = Literal[
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "reduce", "gather", "scatter",
    "send", "recv", "barrier",
]  # fmt: skip

Phase = Literal["activations", "messages", "gathers", "reductions", "once"]
"""Which part of a step issues a collective: exchanges inside a stage, messages between stages, parameters, gradients of
each pass, or what comes once after all passes."""

ALL = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
ENDS = ("ends of pp",)
"""The group of the first and the last stage, where there are others between them."""

FP64 = 8
STEP_NUMBERS = 5
"""What the ranks sum once a step (`engines.step`): square norm, votes, unknown metrics, loss, weight."""


@dataclass(frozen=True, order=True)
class Collective:
    """One exchange, as one rank takes part in it."""

    kind: Kind
    axes: tuple[str, ...]
    """The axes of the mesh that its group spans, outermost first, without those of one rank."""
    bytes: int
    """Bytes of the full buffer, as in the module's docstring."""


@dataclass(frozen=True)
class Term:
    """A collective, how often a step issues it, and why."""

    collective: Collective
    count: int
    why: str
    phase: Phase = "activations"


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
    on_cpu: bool = False,
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
        on_cpu: Whether ranks compute on CPUs, whose loss takes fewer tokens at a time.
    """
    parts = Parts.of(model, vocab_size, sizes, layout, rank)
    number = BYTES[precision]
    activations = Activations(
        model,
        vocab_size,
        sizes=sizes,
        layout=layout,
        recompute=engine.recompute,
        precision=precision,
        passes=passes,
        # Gathered as it computes; where nothing is gathered it is cast where it is used.
        head_number=number if sizes.gradient_parallel > 1 else FP32,
        head_rows=chunk(model.padded_vocab(vocab_size), sizes.tp, sizes.coordinates(rank)["tp"]),
        on_cpu=on_cpu,
    )
    step = _Step(model, sizes, layout, number, passes, parts, activations)
    return [term for term in step.terms() if term.count]


def axes_of(sizes: Mesh, *names: str) -> tuple[str, ...]:
    """Those of some axes that have more than one rank, outermost first."""
    return tuple(name for name in ALL if name in names and getattr(sizes, name) > 1)


def ends_of(sizes: Mesh) -> tuple[str, ...]:
    """The group of the first and the last stage."""
    return ("pp",) if sizes.pp == 2 else ENDS


class Activations:
    """What the techniques exchange in a step's passes, whichever engine runs them.

    Selective recompute exchanges nothing twice: what ranks sent each other is kept (`parallel.recompute`).
    """

    def __init__(
        self,
        model: DecoderConfig,
        vocab_size: int,
        *,
        sizes: Mesh,
        layout: LayoutConfig,
        recompute: Recompute,
        precision: Precision,
        passes: Passes,
        head_number: int,
        head_rows: int | None = None,
        on_cpu: bool = False,
    ) -> None:
        """Args:
        head_number: Bytes of a number of the head's matrix where ranks gather it.
        head_rows: Of the head on this rank; None: as many as the first rank has.
        on_cpu: Whether ranks compute on CPUs.
        """
        self.model, self.sizes, self.layout, self.passes = model, sizes, layout, passes
        self.recompute, self.head_number = recompute, head_number
        self.rows = model.padded_vocab(vocab_size)
        self.chunk_tokens = chunk_tokens(head_rows or -(-self.rows // sizes.tp), on_cpu)
        self.number = BYTES[precision]
        self.own_tokens = passes.tokens // sizes.cp
        self.stream = self.own_tokens * model.width * self.number

    def of(self, stage: StageParts) -> Iterator[Term]:
        """What context and tensor parallelism exchange."""
        if self.sizes.cp > 1:
            yield from self._context(stage)
        if self.sizes.tp > 1:
            yield from self._tensor(stage)

    def _context(self, stage: StageParts) -> Iterator[Term]:
        """Exchanges around attention (`parallel.context`): Jacobs et al. 2023; Dubey et al. 2024, section 3.3.2."""
        axes, each = ("cp",), self.passes.count * len(stage.blocks)
        cp, tp = self.sizes.cp, self.sizes.tp
        forward = each * (2 if self.recompute == "full" else 1)
        heads, key_heads = self.model.heads // tp, self.model.key_value_heads // tp
        number = self.model.width_of_head * self.number
        if self.layout.cp_kind == "ulysses":
            copied = key_heads * max(1, cp // key_heads)
            packed = self.own_tokens * number * (heads + 2 * copied)
            yield _term("all_to_all", axes, packed, forward + each, "queries, keys and values; their gradients")
            back = self.own_tokens * number * heads
            yield _term("all_to_all", axes, back, forward + each, "what was attended to; its gradients")
        else:
            packed = self.passes.tokens * number * 2 * key_heads
            yield _term("all_gather", axes, packed, forward, "keys and values")
            yield _term("reduce_scatter", axes, packed, each, "their gradients")

    def _tensor(self, stage: StageParts) -> Iterator[Term]:
        """Tensor parallelism (Shoeybi et al. 2019), and sequence parallelism (Korthikanti et al. 2022)."""
        axes, m, blocks = ("tp",), self.passes.count, len(stage.blocks)
        again = blocks if self.recompute == "full" else 0
        # A recomputation ends where nothing more is kept: before a block's last sum, unless dropout keeps its bits.
        leaves_again = again * (2 if self.model.dropout else 1)
        if self.layout.sequence_parallel:
            gathers, scatters = 4 * blocks + 2 * again, 4 * blocks + leaves_again
            yield _term("all_gather", axes, self.stream, gathers * m, "into columns; gradients into rows")
            yield _term("reduce_scatter", axes, self.stream, scatters * m, "out of rows; gradients out of columns")
        else:
            sums = 4 * blocks + leaves_again
            yield _term("all_reduce", axes, self.stream, sums * m, "out of rows; gradients out of columns")
        if stage.is_first and self.layout.sequence_parallel:
            yield _term("reduce_scatter", axes, self.stream, m, "rows of the embedding")
            yield _term("all_gather", axes, self.stream, m, "gradients of the embedding's rows")
        elif stage.is_first:
            yield _term("all_reduce", axes, self.stream, m, "rows of the embedding")
        if stage.is_last:
            yield from self._loss(axes)

    def neighbours(self, stage: StageParts, axes: tuple[str, ...]) -> Iterator[Term]:
        """Pipeline parallelism: the residual stream, or a rank's slice of it, and its gradient (Huang et al. 2019).

        Args:
            axes: Of the group that carries the messages.
        """
        m = self.passes.count
        slices = self.sizes.tp if self.layout.sequence_parallel else 1
        for is_end, which in ((stage.is_first, "before"), (stage.is_last, "after")):
            if not is_end:
                size = self.stream // slices
                yield _term("send", axes, size, m, f"to the stage {which}", "messages")
                yield _term("recv", axes, size, m, f"from the stage {which}", "messages")

    def _loss(self, axes: tuple[str, ...]) -> Iterator[Term]:
        m, tokens = self.passes.count, self.own_tokens
        if self.layout.loss_parallel:
            if self.layout.sequence_parallel:
                yield _term("all_gather", axes, self.stream, m, "the last norm's output, into the head's rows")
                yield _term("reduce_scatter", axes, self.stream, m, "its gradients")
            else:
                yield _term("all_reduce", axes, self.stream, m, "gradients of the last norm's output")
            whole, rest = divmod(tokens, self.chunk_tokens)
            for size, count in ((self.chunk_tokens, whole * m), (rest, m if rest else 0)):
                yield _term("all_reduce", axes, size * FP32, count, "highest logit of each token of a chunk")
                yield _term("all_reduce", axes, 2 * size * FP32, count, "its sums of exponentials and targets' logits")
            return
        head = filled(self.rows, self.sizes.tp) * self.model.width * self.head_number
        yield _term("all_gather", axes, head, m, "rows of the head")
        if self.layout.sequence_parallel:
            yield _term("reduce_scatter", axes, head, m, "their gradients")
            numbers = 1 + self.passes.tokens // self.model.context
            yield _term("all_reduce", axes, numbers * FP32, m, "losses of the slices, in all and of each sequence")


class _Step:
    """One step of one rank of the fsdp engine."""

    def __init__(
        self,
        model: DecoderConfig,
        sizes: Mesh,
        layout: LayoutConfig,
        number: int,
        passes: Passes,
        parts: Parts,
        activations: Activations,
    ) -> None:
        self.model, self.sizes, self.layout, self.number = model, sizes, layout, number
        self.passes, self.parts, self.activations = passes, parts, activations

    def terms(self) -> Iterator[Term]:
        """All of them."""
        for stage in self.parts.stages:
            yield from self._sharding(stage)
            yield from self.activations.of(stage)
            if self.sizes.pp > 1:
                yield from self.activations.neighbours(stage, ("pp",))
        yield from (replace(term, phase="once") for term in self._once())

    def _sharding(self, stage: StageParts) -> Iterator[Term]:
        """ZeRO-3 (Rajbhandari et al. 2020), as FSDP2 does it, with what needs no second gather left as it is.

        A block is gathered for its forward and again for its backward pass; the last one stays between the two, and the
        first one stays from its backward to its next forward pass. What is in no block (embedding, last norm, head)
        stays for the whole step. Each pass reduces its gradients, so that none lies whole on a rank.

        In a pipeline all stays for a whole step, gradients whole, since a stage would gather for each micro-batch.
        """
        shards, replicas = axes_of(self.sizes, "dp_shard", "cp"), axes_of(self.sizes, "dp_replicate")
        piped = self.sizes.pp > 1
        for place, (name, parameters) in enumerate(stage.groups):
            padded = sum(parameter.padded_elements(self.parts.shards) for parameter in parameters)
            once = piped or name == "root"
            gathers = 1 if once else self._gathers(place - 1, len(stage.blocks))
            if shards:
                why = f"parameters of {name}, {'once' if once else 'for forward and backward passes'}"
                yield _term("all_gather", shards, padded * self.number, gathers, why, "gathers")
                reductions = 1 if piped else self.passes.count
                reduced = f"gradients of {name}"
                yield _term("reduce_scatter", shards, padded * FP32, reductions, reduced, "reductions")
            if replicas:
                # What the shards have summed, over the replicas, once (HSDP: Zhao et al. 2023).
                part = padded // self.parts.shards * FP32
                yield _term("all_reduce", replicas, part, 1, f"gradients of {name}, after the last pass", "reductions")

    def _gathers(self, block: int, blocks: int) -> int:
        m = self.passes.count
        forward = 1 if block == 0 else m
        backward = 0 if block == blocks - 1 else m
        return forward + backward

    def _once(self) -> Iterator[Term]:
        """What a step exchanges once, after all passes."""
        met_a_part = {"heads", "whole"} if self.layout.sequence_parallel else {"heads"}
        partial = sum(one.own_elements for one in self.parts.all if one.role in met_a_part)
        if partial and self.sizes.tp > 1:
            yield _term("all_reduce", ("tp",), partial * FP32, 1, "gradients of what met a part of the activations")
        ends = [stage for stage in self.parts.stages if stage.is_first or stage.is_last]
        if self.model.tied and self.sizes.pp > 1 and ends:
            tied = sum(one.own_elements for stage in ends for one in stage.root if one.name == "embedding.weight")
            axes = ends_of(self.sizes)
            yield _term(
                "all_reduce", axes, tied * FP32, 1 if tied else 0, "gradients of the tied embedding's two copies"
            )
        if self.sizes.world_size > 1:
            # Of a mixture, loss and weight of each source as well.
            yield _term("all_reduce", axes_of(self.sizes, *ALL), STEP_NUMBERS * FP64, 1, "what a step sums")


def _term(kind: Kind, axes: tuple[str, ...], size: int, count: int, why: str, phase: Phase = "activations") -> Term:
    return Term(Collective(kind, axes, size), count, why, phase)
