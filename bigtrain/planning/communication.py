"""Lists every collective and message of one training step, by kind, axes of the mesh and bytes.

    terms = communication(model, vocabulary, sizes=sizes, layout=layout, engine=engine, precision="bf16", passes=passes)
    total(terms)[Collective("all_gather", ("dp_shard",), 1 << 20)]         # its number in a step

The list is exact, not an estimate: tests compare it with the collectives that real steps issue. Bytes are those of the
full buffer on one rank: the output of an all-gather, the input of a reduce-scatter or an all-to-all, the tensor that an
all-reduce sums, the content of a message. (A ring sends (n - 1) / n of the bytes of an all-gather, a reduce-scatter or
an all-to-all, and twice that for an all-reduce.)

Here a pass is forward and backward of one micro-batch; m is the number of passes of a step.
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
"""The purpose of a collective. activations: inside a stage; messages: between stages; gathers: of parameters;
reductions: of gradients; once: after all passes of a step."""

ALL = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
ENDS = ("ends of pp",)
"""Name of the group of the first and the last stage, if there are stages between them."""

FP64 = 8
STEP_NUMBERS = 5
"""Number of values that the ranks sum once a step (`engines.step`): square, votes, unknown, loss, weight."""


@dataclass(frozen=True, order=True)
class Collective:
    """One collective or message, as seen by one rank."""

    kind: Kind
    axes: tuple[str, ...]
    """The mesh axes that its group spans, outermost first; axes of size 1 are omitted."""
    bytes: int
    """Bytes of the full buffer; see the module's docstring."""


@dataclass(frozen=True)
class Term:
    """A collective, its number in a step, and its reason."""

    collective: Collective
    count: int
    why: str
    phase: Phase = "activations"


@dataclass(frozen=True)
class Passes:
    """Number and shape of the micro-batches of a step on one rank."""

    count: int
    sequences: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.sequences * self.context


def total(terms: Iterable[Term]) -> Counter[Collective]:
    """The number of times that a step issues each collective."""
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
        model: The section of a decoder.
        vocab_size: Number of vocabulary entries, before padding.
        sizes: Sizes of the mesh axes.
        layout: The section `layout`.
        engine: The section `engine`; only `recompute` is used.
        precision: Dtype of the matmuls.
        passes: The micro-batches of a rank.
        rank: The rank. Shards on the last ranks are smaller if they do not divide evenly.
        on_cpu: Whether ranks compute on CPUs, where the loss uses smaller chunks of tokens.
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
        # FSDP gathers the head in the matmuls' dtype; without FSDP it stays FP32 and is cast where it is used.
        head_number=number if sizes.gradient_parallel > 1 else FP32,
        head_rows=chunk(model.padded_vocab(vocab_size), sizes.tp, sizes.coordinates(rank)["tp"]),
        on_cpu=on_cpu,
    )
    step = _Step(model, sizes, layout, number, passes, parts, activations)
    return [term for term in step.terms() if term.count]


def axes_of(sizes: Mesh, *names: str) -> tuple[str, ...]:
    """The named axes that have more than one rank, outermost first."""
    return tuple(name for name in ALL if name in names and getattr(sizes, name) > 1)


def ends_of(sizes: Mesh) -> tuple[str, ...]:
    """The axes of the group of the first and the last stage."""
    return ("pp",) if sizes.pp == 2 else ENDS


class Activations:
    """The communication of activations in a step's passes, which is the same for all engines.

    Selective recompute repeats no collective, because it keeps what ranks received (`parallel.recompute`).
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
        """Store the sizes that the terms depend on.

        Args:
            head_number: Bytes per element of the head's matrix when tp ranks gather it.
            head_rows: Rows of the head on this rank; None: as many as on the first tp rank.
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
        """The communication of context and tensor parallelism in a stage."""
        if self.sizes.cp > 1:
            yield from self._context(stage)
        if self.sizes.tp > 1:
            yield from self._tensor(stage)

    def _context(self, stage: StageParts) -> Iterator[Term]:
        """The collectives around attention (`parallel.context`; Jacobs et al. 2023; Dubey et al. 2024, sec. 3.3.2)."""
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
        """The communication of tensor (Shoeybi et al. 2019) and sequence parallelism (Korthikanti et al. 2022)."""
        axes, m, blocks = ("tp",), self.passes.count, len(stage.blocks)
        again = blocks if self.recompute == "full" else 0
        # Recompute stops after the last tensor that the backward pass needs: before the block's last all-reduce or
        # reduce-scatter, or after it if dropout keeps a mask.
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
        """The messages of pipeline parallelism (Huang et al. 2019): the residual stream and its gradient.

        Under sequence parallelism each rank sends its slice of them.

        Args:
            axes: The axes of the group that carries the messages.
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
    """The communication of one step of the fsdp engine on one rank."""

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
        """All terms of the step."""
        for stage in self.parts.stages:
            yield from self._sharding(stage)
            yield from self.activations.of(stage)
            if self.sizes.pp > 1:
                yield from self.activations.neighbours(stage, ("pp",))
        yield from (replace(term, phase="once") for term in self._once())

    def _sharding(self, stage: StageParts) -> Iterator[Term]:
        """The communication of FSDP2 (ZeRO-3, Rajbhandari et al. 2020) in a stage, without unnecessary gathers.

        A block is gathered for its forward pass and again for its backward pass. The last block stays gathered between
        the two, and the first block from its backward pass to its next forward pass. Parameters outside of blocks
        (embedding, last norm, head) stay gathered for the full step. Each pass reduce-scatters its gradients, so that
        no rank keeps unsharded ones.

        With pipeline parallelism parameters stay gathered, and gradients unsharded, for the full step. Otherwise a
        stage would gather for each micro-batch.
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
                # HSDP (Zhao et al. 2023): replicas all-reduce the reduce-scattered gradients once.
                part = padded // self.parts.shards * FP32
                yield _term("all_reduce", replicas, part, 1, f"gradients of {name}, after the last pass", "reductions")

    def _gathers(self, block: int, blocks: int) -> int:
        m = self.passes.count
        forward = 1 if block == 0 else m
        backward = 0 if block == blocks - 1 else m
        return forward + backward

    def _once(self) -> Iterator[Term]:
        """The collectives that a step issues once, after all passes."""
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
            # A mixture of sources adds two values per source, which are not counted here.
            yield _term("all_reduce", axes_of(self.sizes, *ALL), STEP_NUMBERS * FP64, 1, "what a step sums")


def _term(kind: Kind, axes: tuple[str, ...], size: int, count: int, why: str, phase: Phase = "activations") -> Term:
    return Term(Collective(kind, axes, size), count, why, phase)
