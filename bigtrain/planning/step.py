"""Estimates the time of a step, by term, from the computation and communication of each stage and their overlap.

    step = Step(stages, passes=8, ...)          # independent of the machine
    seconds = step.seconds(cluster)             # on a machine; its terms add up to `seconds.total`

The slowest stage sets the pace. Let m be the number of passes, and t_i the time of a pass through stage i. A 1F1B
pipeline takes sum_i t_i + (m - 1) max_i t_i (Narayanan et al. 2021, section 2.2). With v stages per rank, the sum over
the other stages is divided by v; zero-bubble leaves about a third of it (Qi et al. 2023).

Collectives of activations are on the critical path. Gathers of parameters and reductions of gradients overlap with the
computation of their pass, up to its duration. They slow it by the share `Rates.interference` of their time. The first
gather and the last reduction overlap with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from bigtrain.hardware.cluster import Cluster
from bigtrain.parallel.config import Mesh, PipelineSchedule
from bigtrain.planning.communication import Term
from bigtrain.planning.kernels import Accelerator, Seconds, Work
from bigtrain.planning.links import Network

ZERO_BUBBLE_LEFT = 1 / 3
"""Share of 1F1B's idle time that zero-bubble leaves: a forward pass is a third of a micro-batch's time; gradients of
inputs and gradients of weights are the other two thirds."""
OPTIMIZER_BYTES = 40
"""Bytes that an update reads and writes per parameter: gradient (norm, scaling, update), weight, two moments; FP32."""
OPTIMIZER_KERNELS_PER_BLOCK = 6


@dataclass(frozen=True)
class StageWork:
    """Computation and communication of one stage in a step. Each `Work` is of one pass; terms are of all passes."""

    block: tuple[Work, Work]
    """Work of one block: forward, and backward with recompute."""
    ends: tuple[Work, Work] = (Work(), Work())
    """Work of embedding and head: forward and backward."""
    critical: tuple[Term, ...] = ()
    """Collectives of activations inside the stage."""
    messages: tuple[Term, ...] = ()
    """Messages to and from the neighbouring stages."""
    gathers: tuple[Term, ...] = ()
    """Gathers of parameters."""
    reductions: tuple[Term, ...] = ()
    """Reductions of gradients."""
    once: tuple[Term, ...] = ()
    """Collectives after all passes, which overlap with nothing."""
    blocks: int = 1
    """Number of blocks on the rank."""
    trained: float = 0.0
    """Number of parameters that this rank updates."""
    ranks: int = 1
    """Number of pp ranks with this work."""


@dataclass(frozen=True)
class StepSeconds:
    """Time of a step by term, in seconds; all terms but `hidden` add up to the time of the step."""

    matmul: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    launch: float = 0.0
    """Host time: kernels that the host starts too slowly, and its work for each pass and step."""
    tensor_and_context: float = 0.0
    """Collectives of activations over tp and cp."""
    pipeline_messages: float = 0.0
    bubble: float = 0.0
    """Idle time while the pipeline fills and drains, and while ranks wait for slower stages."""
    sharding: float = 0.0
    """Collectives of parameters and gradients that do not overlap with computation."""
    optimizer: float = 0.0
    hidden: float = 0.0
    """Collectives that overlap with computation; not part of the step's time."""

    @property
    def total(self) -> float:
        """Time of the step."""
        return sum(getattr(self, one.name) for one in fields(self)) - self.hidden

    def plain(self) -> dict[str, float]:
        """The terms and their total by name, for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"total": self.total}


@dataclass(frozen=True)
class Step:
    """One training step of a layout."""

    stages: tuple[StageWork, ...]
    sizes: Mesh
    passes: int
    precision: str = "bf16"
    number: int = 2
    schedule: PipelineSchedule = "1f1b"
    stages_per_rank: int = 1
    overlaps: bool = True
    """Whether gathers and reductions overlap with computation; older programs reduce after the last pass."""
    critical_share: float = 1.0
    """Share of the collectives of activations that no matmul overlaps: 1 / tp if they are pipelined with matmuls."""
    once_a_step: bool = False
    """Whether gathers run only in the first pass of a step, and reductions only in the last one."""

    def seconds(self, cluster: Cluster) -> StepSeconds:
        """Estimate the step's time on a machine."""
        at = _Evaluation(self, cluster)
        times = [at.stage(stage) for stage in self.stages]
        pace = max(one.pass_s for one in times)
        slowest = next(one for one in times if one.pass_s == pace)
        together = sum(one.pass_s * stage.ranks for one, stage in zip(times, self.stages, strict=True))
        fill = (together - pace) / self.stages_per_rank
        if self.schedule == "zero_bubble":
            fill *= ZERO_BUBBLE_LEFT
        ending = max(range(len(times)), key=lambda place: times[place].ending)
        of_passes = slowest.of_passes
        return replace(
            of_passes,
            bubble=fill if self.sizes.pp > 1 else 0.0,
            sharding=times[ending].sharding,
            optimizer=times[ending].optimizer,
            launch=of_passes.launch + cluster.rates.step_s,
            hidden=times[ending].hidden,
        )


@dataclass(frozen=True)
class _StageSeconds:
    pass_s: float
    of_passes: StepSeconds
    """Times of all passes of a step."""
    sharding: float
    optimizer: float
    hidden: float

    @property
    def ending(self) -> float:
        return self.sharding + self.optimizer


class _Evaluation:
    def __init__(self, step: Step, cluster: Cluster) -> None:
        self.step, self.cluster = step, cluster
        self.accelerator = Accelerator(cluster, step.precision, step.number)
        self.network = Network(cluster, step.sizes)

    def stage(self, stage: StageWork) -> _StageSeconds:
        m, rates = self.step.passes, self.cluster.rates
        critical, messages = self._sum(stage.critical) * self.step.critical_share / m, self._sum(stage.messages) / m
        busy, waiting, compute = [], 0.0, Seconds()
        for block, ends in zip(stage.block, stage.ends, strict=True):
            of_block, of_ends = self.accelerator.seconds(block), self.accelerator.seconds(ends)
            exchanged = critical / 2 / stage.blocks
            # The host is assumed not to run ahead of a block, so the time by which it is slower is lost.
            waiting += stage.blocks * max(0.0, block.kernels * rates.launch_s - of_block.busy - exchanged)
            waiting += max(0.0, ends.kernels * rates.launch_s - of_ends.busy)
            compute += of_block * stage.blocks + of_ends
            busy.append(of_block.busy * stage.blocks + of_ends.busy + critical / 2)
        launch = waiting + rates.pass_s
        pass_s = sum(busy) + launch + messages
        hidden, exposed = self._sharding(stage, busy)
        once = self._sum(stage.once)
        by_term = StepSeconds(
            compute.matmul * m, compute.attention * m, compute.memory * m, launch * m, critical * m, messages * m
        )
        return _StageSeconds(pass_s, by_term, exposed + once, self._optimizer(stage), hidden)

    def _sharding(self, stage: StageWork, busy: Sequence[float]) -> tuple[float, float]:
        """Seconds of gathers and reductions that overlap with computation, and of those that do not."""
        gathers, reductions = self._sum(stage.gathers), self._sum(stage.reductions)
        if not self.step.overlaps:
            return 0.0, gathers + reductions
        once = self.step.once_a_step
        passes = 1 if once else self.step.passes
        before, after = (gathers, 0.0) if once else (gathers / 2, gathers / 2)
        after += reductions
        first, last = gathers / max(1, stage.blocks * passes * 2), reductions / max(1, stage.blocks * passes)
        hidden = min(before, busy[0] * passes) + min(after, busy[1] * passes)
        exposed = before + after - hidden + min(first, before) + min(last, after)
        return hidden, exposed + hidden * self.cluster.rates.interference

    def _optimizer(self, stage: StageWork) -> float:
        rates = self.cluster.rates
        moved = stage.trained * OPTIMIZER_BYTES / (self.cluster.device.bandwidth_bytes_per_s * rates.memory)
        return moved + stage.blocks * OPTIMIZER_KERNELS_PER_BLOCK * rates.launch_s

    def _sum(self, terms: Sequence[Term]) -> float:
        return sum(term.count * self.network.seconds(term.collective) for term in terms)
