"""Searches the legal executions of a run on a number of GPUs, and ranks those that fit the memory by their time.

    found = search(job, cluster("h100"), gpus=512)
    found.best, found.ranked, found.legal

The search varies tp, pp and its schedule, cp, replicas, micro-batch, recompute, and under deepspeed the ZeRO stage. An
execution is legal if `LayoutConfig.check` and `check_support` accept it. Memory is estimated first; the time of an
execution that does not fit is not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bigtrain.config import UserError
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.support import check_support
from bigtrain.hardware.cluster import Cluster
from bigtrain.parallel.config import LayoutConfig, Mesh, Recompute
from bigtrain.planning.estimate import Estimate, Job
from bigtrain.planning.peak import Memory

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
MICRO_SIZES = (1, 2, 4, 8, 16)
LEAST_TOKENS_OF_A_PART = 2048
"""Fewest tokens of a sequence on a cp rank; with fewer, communication takes most of the time."""
MOST_FILLERS = 0.1
"""Largest share of padding sequences, relative to the batch, if micro-batches do not divide it."""
SAME = 0.01
"""Executions whose times differ by less than this share are ranked by memory."""
TIMED = 1.5
"""An execution is not timed if the lower bound of its time is more than this multiple of the best time."""
NEAR = 64
"""If no layout is legal on the given number of GPUs, numbers up to this distance are tried."""


@dataclass
class Found:
    """The result of a search."""

    job: Job
    on: Cluster
    gpus: int
    ranked: list[Estimate]
    """Executions that fit and were timed, the fastest first."""
    tightest: Estimate | None
    """If nothing fits, the execution that needs least memory; else None."""
    legal: int
    """Number of legal executions, whether they fit or not."""
    too_large: int = 0
    """Number of legal executions that do not fit."""

    @property
    def best(self) -> Estimate | None:
        """The fastest execution that fits; None if nothing fits."""
        return self.ranked[0] if self.ranked else None


def search(job: Job, on: Cluster, gpus: int) -> Found:
    """Rank the legal executions of a job.

    Raises:
        UserError: No layout is legal on that many GPUs (the error names the nearest number with one), or the device
            does not support the job's precision.
    """
    if on.device.peak(job.precision) is None:
        kinds = ", ".join(on.device.peak_flops)
        raise UserError(f"{on.device.name} has no units for {job.precision}", "precision", f"Use one of: {kinds}.")
    found = Found(job, on, gpus, [], None, 0)
    least: tuple[int, Job] | None = None
    bound = math.inf
    for one, sizes in _all_executions(job, on, gpus):
        found.legal += 1
        memory, _ = one.peak(sizes, one.passes(sizes), on)
        if memory.total > on.memory_bytes:
            found.too_large += 1
            if least is None or memory.total < least[0]:
                least = memory.total, one
            continue
        if _at_least(one, on, gpus) > bound * TIMED:
            continue
        estimate = one.estimate(on, gpus)
        bound = min(bound, estimate.seconds.total)
        found.ranked.append(estimate)
    if not found.legal:
        raise _no_layout(job, on, gpus)
    found.ranked.sort(key=lambda one: (round(math.log(one.seconds.total) / SAME), one.memory.total))
    if least is not None and not found.ranked:
        found.tightest = least[1].estimate(on, gpus)
    return found


def _all_executions(job: Job, on: Cluster, gpus: int) -> Iterator[tuple[Job, Mesh]]:
    for layout in _layouts(job, on, gpus):
        sizes = layout.mesh(gpus)
        for one in _executions(replace(job, layout=layout), sizes):
            yield one, sizes


def _layouts(job: Job, on: Cluster, gpus: int) -> Iterator[LayoutConfig]:
    """The legal layouts on `gpus` GPUs; `micro_size` is not set."""
    model = job.model
    for tp in _divisors(gpus, min(on.per_node, gpus)):
        if on.per_node % tp and tp > 1:
            continue
        for cp in _divisors(gpus // tp, max(1, model.context // LEAST_TOKENS_OF_A_PART)):
            if cp & (cp - 1) or cp > 16:
                continue
            for pp in _divisors(gpus // (tp * cp), model.layers):
                data = gpus // (tp * cp * pp)
                if data > job.batch:
                    continue
                for schedule, stages in _schedules(job, pp):
                    for replicas in _replicas(data, tp * cp, pp, on):
                        yield from _legal(
                            job,
                            tp=tp,
                            cp=cp,
                            pp=pp,
                            dp_replicate=replicas,
                            pp_schedule=schedule,
                            pp_stages_per_rank=stages,
                        )


def _legal(job: Job, **keys: Any) -> Iterator[LayoutConfig]:
    kinds = ("ulysses", "all_gather") if keys["cp"] > 1 else ("ulysses",)
    for kind in kinds:
        layout = LayoutConfig(
            **keys, cp_kind=kind, sequence_parallel=job.layout.sequence_parallel, loss_parallel=job.layout.loss_parallel
        )
        try:
            layout.check(job.model, job.vocab_size)
        except ValueError:
            continue
        yield layout
        return


def _schedules(job: Job, pp: int) -> Iterator[tuple[str, int]]:
    if pp == 1:
        yield "1f1b", 1
        return
    yield "1f1b", 1
    if isinstance(job.engine, DeepSpeedConfig):
        return
    for stages in (2, 4):
        if job.model.layers >= 2 * stages * pp:
            yield "interleaved", stages
    yield "zero_bubble", 1


def _replicas(data: int, inner: int, pp: int, on: Cluster) -> Iterator[int]:
    """Values of dp_replicate: 1, and those for which a copy of the model takes one node, 8 nodes or 64 nodes."""
    yield 1
    for nodes in (1, 8, 64):
        shard = max(1, on.per_node * nodes // inner)
        if shard < data and data % shard == 0 and pp <= 2:
            yield data // shard


def _executions(job: Job, sizes: Mesh) -> Iterator[Job]:
    """The executions of a layout: sizes of micro-batches, recompute and ZeRO stages."""
    share = -(-job.batch // sizes.data_parallel)
    seen: set[tuple[int, int]] = set()
    for micro in MICRO_SIZES:
        if micro > share:
            break
        layout = job.layout.model_copy(update={"micro_size": micro})
        sized = replace(job, layout=layout)
        passes = sized.passes(sizes)
        shape = passes.count, passes.sequences
        used = passes.count * passes.sequences * sizes.data_parallel
        if shape in seen or used > job.batch * (1 + MOST_FILLERS):
            continue
        seen.add(shape)
        for recompute in RECOMPUTES:
            for update in _stages_of_zero(job):
                engine = job.engine.model_copy(update={"recompute": recompute, **update})
                try:
                    check_support(engine, job.model.arch, layout, document_mask=job.documents, precision=job.precision)
                except UserError:
                    continue
                yield replace(sized, engine=engine)


def _stages_of_zero(job: Job) -> Iterator[dict[str, int]]:
    if not isinstance(job.engine, DeepSpeedConfig):
        yield {}
        return
    for stage in (1, 2, 3):
        yield {"zero": stage}


def _at_least(job: Job, on: Cluster, gpus: int) -> float:
    """A lower bound of the step's time in seconds: all FLOPs at the rate of large matmuls, plus pipeline idle time.

    The FLOPs include those of recompute full.
    """
    flops = job.model.flops_per_token(job.vocab_size).causal * job.batch * job.model.context
    again = 4 / 3 if getattr(job.engine, "recompute", "none") == "full" else 1.0
    peak = on.device.peak(job.precision) or math.inf
    bubble = 1.0
    if job.layout.pp > 1 and job.layout.pp_schedule != "zero_bubble":
        count = job.passes(job.layout.mesh(gpus)).count
        bubble += (job.layout.pp - 1) / (count * job.layout.pp_stages_per_rank)
    return flops * again * bubble / (peak * on.rates.matmul * gpus)


def _no_layout(job: Job, on: Cluster, gpus: int) -> UserError:
    near = next((size for size in _around(gpus) if next(_all_executions(job, on, size), None) is not None), None)
    most = job.batch * job.model.layers * on.per_node
    fix = (
        f"Use {near} GPUs, the nearest number with a legal layout."
        if near
        else f"A batch of {job.batch} sequences takes at most {most}."
    )
    return UserError(f"No layout of this model and batch is legal on {gpus} GPUs", "--gpus", fix)


def _around(gpus: int) -> Iterator[int]:
    for away in range(1, NEAR + 1):
        yield from (size for size in (gpus - away, gpus + away) if size > 0)
    size = 1 << (gpus.bit_length() - 1)
    while size:
        yield size
        size >>= 1


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def fewest_gpus(job: Job, on: Cluster, gpus: int, most: int = 65_536) -> int | None:
    """The fewest GPUs, among doublings of `gpus` up to `most`, on which an execution fits; None if there are none."""
    size = gpus * 2
    while size <= most:
        for one, sizes in _all_executions(job, on, size):
            if one.peak(sizes, one.passes(sizes), on)[0].total <= on.memory_bytes:
                return size
        size *= 2
    return None


def would_have_to_give(found: Found) -> list[str]:
    """Messages that explain what does not fit, and what would make it fit; empty if something fits."""
    tightest = found.tightest
    if tightest is None:
        return []
    memory: Memory = tightest.memory
    over = memory.total - tightest.limit_bytes
    term = memory.largest
    lines = [
        f"the smallest execution needs {memory.total / 2**30:.1f} GiB on a GPU, {over / 2**30:.1f} GiB more than the "
        f"{tightest.limit_bytes / 2**30:.1f} GiB that it can use; the largest part is {term} "
        f"({getattr(memory, term) / 2**30:.1f} GiB)"
    ]
    more = fewest_gpus(found.job, found.on, found.gpus)
    if more is not None:
        lines.append(f"it fits on {more} GPUs")
    lines.append(ADVICE.get(term, "a device with more memory"))
    return lines


ADVICE = {
    "parameters": "more GPUs, or fewer parameters",
    "gradients": "more GPUs, or fewer parameters",
    "optimizer": "more GPUs, fewer parameters, or an optimizer with less state",
    "gathered": "more tp or pp, so that a stage has fewer parameters",
    "gradient_buffers": "more tp or pp, so that a stage has fewer parameters",
    "activations": "engine.recompute: full, a smaller layout.micro_size, more tp, cp or pp, or a shorter context",
    "messages": "more data-parallel ranks, which have fewer micro-batches each, or a smaller batch",
    "working": "more tp or cp, or a smaller layout.micro_size",
    "logits": "more tp with loss_parallel, or a smaller vocabulary",
}
"""What reduces each term of the memory."""
