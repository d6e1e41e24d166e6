"""The section `layout`: how the model and the batch are distributed over the ranks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge
from pydantic import field_validator, model_validator

from bigtrain.config import Count, Section

if TYPE_CHECKING:
    from bigtrain.models.config import BlockCosts, ModelConfig

Size = Annotated[Count, Ge(1)]

ContextKind = Literal["ulysses", "all_gather"]
"""How the ranks of a context-parallel group exchange data in attention; see `parallel.context`."""

PipelineSchedule = Literal["1f1b", "interleaved", "zero_bubble"]
"""The order in which the stages of a pipeline compute micro-batches."""

Recompute = Literal["none", "selective", "full"]
"""Activations that the backward pass recomputes: none, the cheap ones, or all but the inputs of blocks."""


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes of a job, outermost first; their product is the world size."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return math.prod(asdict(self).values())

    @property
    def data_parallel(self) -> int:
        """Number of ranks that consume different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def gradient_parallel(self) -> int:
        """Number of ranks over which a stage's gradients are summed: data-parallel ranks times cp."""
        return self.data_parallel * self.cp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank, by axis; tp varies fastest."""
        places = {}
        for axis, size in reversed(asdict(self).items()):
            rank, places[axis] = divmod(rank, size)
        return places

    def data_parallel_rank(self, rank: int) -> int:
        """Index of the part of the batch that a rank reads; equal for ranks that differ only in pp, cp and tp."""
        places = self.coordinates(rank)
        return places["dp_replicate"] * self.dp_shard + places["dp_shard"]

    def counts_loss(self, rank: int) -> bool:
        """Whether a rank's sum of losses counts: tp rank 0 of the last stage. Other tp ranks have the same sum."""
        places = self.coordinates(rank)
        return places["tp"] == 0 and places["pp"] == self.pp - 1


class LayoutConfig(Section):
    """How the model and the batch are distributed over the ranks."""

    dp_replicate: Size = 1
    """Number of copies of the sharded model (above 1: HSDP)."""

    dp_shard: Count = -1
    """Number of ranks over which parameters, gradients and optimizer state are sharded; -1: all remaining ranks."""

    cp: Size = 1
    """Number of ranks over which the tokens of each sequence are split (context parallelism), for long sequences."""

    cp_kind: ContextKind = "ulysses"
    """How cp ranks exchange data in attention. ulysses: all-to-all over heads (Jacobs et al. 2023). all_gather: gathers
    keys and values, for any number of heads (Llama 3, section 3.3.2)."""

    pp: Size = 1
    """Number of ranks over which the blocks are split (pipeline parallelism). With m micro-batches they idle for
    (pp - 1) / (pp_stages_per_rank * m) of their compute time (Narayanan et al. 2021, section 2.2): choose micro_size so
    that m is several times pp. Each rank keeps its gathered parameters for a full step."""

    pp_schedule: PipelineSchedule = "1f1b"
    """1f1b: one forward, one backward (Narayanan et al. 2019). interleaved: 1f1b with several stages per rank.
    zero_bubble: gradients of weights are delayed into the idle time (Qi et al. 2023)."""

    pp_stages_per_rank: Size = 1
    """Number of stages on each rank: 1 for 1f1b, above 1 for interleaved. Rank r holds stages r, r + pp, ..."""

    pp_split: Literal["auto"] | tuple[Size, ...] = "auto"
    """Number of blocks of each stage, in order. auto: minimizes the cost of the most expensive stage, with embedding
    and head."""

    tp: Size = 1
    """Number of ranks over which each matrix is split (tensor parallelism, Shoeybi et al. 2019). They exchange
    activations, so keep them inside a node."""

    micro_size: Size | None = None
    """Largest micro-batch of a rank, in sequences; null: the rank's full share of the global batch."""

    sequence_parallel: bool = True
    """Whether norms, dropout and the residual stream are split over tp too, along the sequence (Korthikanti et al.
    2022)."""

    loss_parallel: bool = True
    """Whether the head and its logits stay split over tp in the loss; false: each rank gathers the head."""

    @field_validator("dp_shard")
    @classmethod
    def _is_a_size(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError(f"{value} is not a size: give a number of ranks, or -1 for all that are left")
        return value

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> LayoutConfig:
        if self.pp == 1 and self.pp_stages_per_rank > 1:
            raise ValueError("pp_stages_per_rank above 1 needs pp 2 or more")
        if self.pp > 1 and self.pp_schedule == "1f1b" and self.pp_stages_per_rank > 1:
            raise ValueError(
                "pp_schedule 1f1b has one stage a rank: set pp_stages_per_rank to 1, or pp_schedule to interleaved"
            )
        if self.pp > 1 and self.pp_schedule == "interleaved" and self.pp_stages_per_rank == 1:
            raise ValueError(
                "pp_schedule interleaved needs pp_stages_per_rank of 2 or more; with 1 the schedule is 1f1b"
            )
        if self.pp_split != "auto" and len(self.pp_split) != self.stages:
            raise ValueError(f"pp_split names {len(self.pp_split)} stages, but the layout has {self.stages}")
        return self

    @property
    def stages(self) -> int:
        """Number of pipeline stages, over all ranks."""
        return self.pp * self.pp_stages_per_rank

    @property
    def least_micro_batches(self) -> int:
        """Smallest number of micro-batches per step that the pipeline's schedule accepts."""
        return self.pp

    @property
    def micro_batch_multiple(self) -> int:
        """The number of micro-batches per step must be a multiple of this number."""
        return 1 if self.pp_schedule == "1f1b" else self.pp

    def split(self, costs: BlockCosts) -> tuple[int, ...]:
        """Number of blocks of each stage, in order.

        Raises:
            ValueError: There are fewer blocks than stages, or `pp_split` does not add up to the number of blocks.
        """
        if costs.blocks < self.stages:
            per_rank = self.pp_stages_per_rank
            most = costs.blocks // per_rank
            fits = f"pp may be {_listed(list(range(1, most + 1)))}" if most > 1 else "use pp 1"
            raise ValueError(
                f"layout.pp {self.pp} with pp_stages_per_rank {per_rank} makes {self.stages} stages of "
                f"{costs.blocks} blocks; with {per_rank} for each rank, {fits}"
            )
        if self.pp_split == "auto":
            return balanced(costs, self.stages)
        if sum(self.pp_split) != costs.blocks:
            suggestion = list(balanced(costs, self.stages))
            raise ValueError(
                f"layout.pp_split adds up to {sum(self.pp_split)} blocks, but the model has {costs.blocks}; auto "
                f"makes it {suggestion}"
            )
        return self.pp_split

    def mesh(self, world_size: int) -> Mesh:
        """Sizes of the mesh axes for `world_size` ranks.

        Raises:
            ValueError: The product of the axes is not the world size.
        """
        fixed = {"dp_replicate": self.dp_replicate, "tp": self.tp, "cp": self.cp, "pp": self.pp}
        taken = math.prod(fixed.values())
        shard = world_size // taken if self.dp_shard == -1 else self.dp_shard
        if shard * taken == world_size:
            return Mesh(dp_shard=shard, **fixed)
        given = {"dp_shard": self.dp_shard} | {axis: size for axis, size in fixed.items() if size > 1}
        axis = max(fixed, key=lambda name: fixed[name])
        others = taken // fixed[axis]
        sizes = _divisors(world_size // others) if world_size % others == 0 else []
        advice = f"with dp_shard -1, {axis} may be {_listed(sizes)}" if sizes else "lower one of them"
        product = " x ".join(f"{name} {size}" for name, size in given.items())
        raise ValueError(f"layout {product} does not make {world_size} ranks; {advice}")

    def check(self, model: ModelConfig, outputs: int) -> None:
        """Refuse this layout if the model does not support it.

        Args:
            outputs: Number of vocabulary entries, or of classes.

        Raises:
            ValueError: The model does not support the layout. The message names sizes that would work.
        """
        self._check_pipeline(model, outputs)
        self._check_tensor_parallel(model, outputs)
        self._check_context_parallel(model)

    def _check_pipeline(self, model: ModelConfig, outputs: int) -> None:
        if self.stages > 1:
            costs = model.block_costs(outputs)
            if costs is None:
                raise ValueError(
                    f"layout.pp is {self.pp}, but a model of arch '{model.arch}' cannot be split into stages: use pp 1"
                )
            self.split(costs)
        elif self.pp_split != "auto":
            raise ValueError("layout.pp_split has no meaning with pp 1: remove it")

    def _check_tensor_parallel(self, model: ModelConfig, outputs: int) -> None:
        if self.tp == 1:
            return
        sizes = model.tensor_parallel_sizes()
        if sizes is None:
            raise ValueError(f"layout.tp is {self.tp}, but a model of arch '{model.arch}' has no tensor plan: use tp 1")
        whole = math.gcd(*sizes.values())
        fits = [tp for tp in _divisors(whole) if _rows_for_all(outputs, tp)]
        wrong = [f"model.{name} {size}" for name, size in sizes.items() if size % self.tp]
        if wrong:
            raise ValueError(f"layout.tp {self.tp} does not divide {' and '.join(wrong)}; tp may be {_listed(fits)}")
        if not _rows_for_all(outputs, self.tp):
            raise ValueError(
                f"layout.tp {self.tp} leaves a rank without one of {outputs} rows; tp may be {_listed(fits)}"
            )
        if self.sequence_parallel and model.context % self.tp:
            fits = [tp for tp in fits if model.context % tp == 0]
            raise ValueError(
                f"layout.tp {self.tp} does not divide model.context {model.context}; tp may be {_listed(fits)}, "
                "or any that fits the model with layout.sequence_parallel: false"
            )

    def _check_context_parallel(self, model: ModelConfig) -> None:
        if self.cp == 1:
            return
        heads = model.context_parallel_heads()
        if heads is None:
            raise ValueError(
                f"layout.cp is {self.cp}, but a model of arch '{model.arch}' does not support context "
                "parallelism: use cp 1"
            )
        query, key = (count // self.tp for count in heads)
        wrong = []
        multiple = self._multiple(self.cp, self.cp_kind)
        if model.context % multiple:
            wrong.append(f"needs model.context {model.context} to be a multiple of {multiple}")
        if self.cp_kind == "ulysses" and not _shares_heads(query, key, self.cp):
            whose = f" of a rank under tp {self.tp}" if self.tp > 1 else ""
            wrong.append(f"cannot divide {query} query and {key} key heads{whose}")
        if wrong:
            other: ContextKind = "all_gather" if self.cp_kind == "ulysses" else "ulysses"
            fits: dict[ContextKind, str] = {"ulysses": "", "all_gather": ""}
            for kind in fits:
                sizes = [cp for cp in _divisors(model.context) if model.context % self._multiple(cp, kind) == 0]
                fits[kind] = _listed([cp for cp in sizes if kind != "ulysses" or _shares_heads(query, key, cp)])
            raise ValueError(
                f"layout.cp {self.cp} ({self.cp_kind}) {' and '.join(wrong)}; cp may be {fits[self.cp_kind]}, or with "
                f"layout.cp_kind: {other} {fits[other]}"
            )

    def _multiple(self, cp: int, kind: ContextKind) -> int:
        """The sequence length must be a multiple of this number: cp ranks, their chunks, and tp divide a sequence."""
        chunks = 2 if kind == "all_gather" and cp > 1 else 1
        return cp * math.lcm(chunks, self.tp if self.sequence_parallel else 1)


def _shares_heads(query: int, key: int, ranks: int) -> bool:
    """Whether each rank can get equally many query and key heads. If there are fewer key heads than ranks, they are
    repeated."""
    return query % ranks == 0 and (key % ranks == 0 or ranks % key == 0)


@lru_cache(maxsize=1024)
def balanced(costs: BlockCosts, stages: int) -> tuple[int, ...]:
    """Number of blocks of each stage, at least one. Minimizes the cost of the most expensive stage, then of the next.

    In a tie, later stages get more blocks, because earlier stages keep activations of more micro-batches.
    """
    counts = [1] * stages
    extra = [0.0] * stages
    extra[0] += costs.before
    extra[-1] += costs.after
    for _ in range(costs.blocks - stages):
        # All blocks cost the same, so adding each one to the cheapest stage is optimal.
        cheapest = min(range(stages), key=lambda stage: (counts[stage] + extra[stage], -stage))
        counts[cheapest] += 1
    return tuple(counts)


def _rows_for_all(rows: int, ranks: int) -> bool:
    """Whether each rank gets at least one row if the rows are split as `torch.chunk` does."""
    return (ranks - 1) * -(-rows // ranks) < rows


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
