"""What a layout costs beside the same one written with torch's own APIs: `python -m tests.bench.bench_layouts`.

Four processes hold bigtrain's engine and two runs of `plain_layouts`, all of the same Llama from the same weights. They
first take the same steps: losses and gradient norms must agree, and so must the collectives of a step (kind, group,
bytes, count), exactly. Then they take timed steps on the same batches, step about: a round is a pair of bigtrain and a
plain run, and a pair of the two plain runs, whose ratio (A/A) is the noise of the measurement. Every second round swaps
the order within its pairs. A step's time runs from one barrier of all ranks to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.engines.contract import MicroBatch
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.hardware.this_machine import this_machine
from bigtrain.models.families.llama import Config as Llama
from bigtrain.models.init import initialise
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.parallel.mesh import Ranks
from bigtrain.planning.communication import Collective
from bigtrain.testing.bench_train import summary
from bigtrain.testing.collectives import RecordedCollectives
from bigtrain.testing.ranks import RankPool
from tests.bench.plain_layouts import Layout, Run, Shape

RANKS = 4
OPTIMIZER = AdamWConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
CLIP = 1.0
"""The default of `optimizer.clip`."""
SEED = 0
CHECKED_STEPS = 3
WARMUP_ROUNDS = 1
SAME_LOSS = 1e-5
"""Relative: both sides must compute the same, or their times say nothing."""
ALLOWED = 0.05
"""What a step may cost more than the plain run's, beyond the noise."""
MAX_NOISE = 0.10
TIMEOUT_S = 600.0

Step = Callable[[int], tuple[float, float]]
"""From the number of a step to its mean loss and gradient norm."""


@dataclass(frozen=True)
class Case:
    """A layout in the words of both sides."""

    native: dict[str, Any]
    plain: Layout
    pipelined: bool = False


LAYOUTS = {
    "dp4": Case({"dp_shard": 4}, Layout(shards=4)),
    "hsdp2x2": Case({"dp_replicate": 2, "dp_shard": 2}, Layout(replicas=2, shards=2)),
    "tp4": Case({"tp": 4}, Layout(tp=4)),
    "tp2 x dp2": Case({"tp": 2, "dp_shard": 2}, Layout(tp=2, shards=2)),
    "cp4": Case({"cp": 4}, Layout(cp=4)),
    "cp2 x dp2": Case({"cp": 2, "dp_shard": 2}, Layout(cp=2, shards=2)),
    "pp4": Case({"pp": 4, "pp_split": (1, 1, 1, 1)}, Layout(pp=4), pipelined=True),
    "pp2 x dp2": Case({"pp": 2, "dp_shard": 2, "pp_split": (2, 2)}, Layout(pp=2, shards=2), pipelined=True),
}


@dataclass(frozen=True)
class Size:
    """Of the model and of a step."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    vocabulary: int = 1024
    context: int = 96
    batch: int = 8

    @property
    def model(self) -> Llama:
        """The section that bigtrain builds from."""
        return Llama(layers=self.layers, width=self.width, heads=self.heads, context=self.context)

    @property
    def shape(self) -> Shape:
        """The same for the plain side."""
        return Shape(self.vocabulary, self.layers, self.width, self.heads, self.model.hidden_width)


@dataclass
class Measured:
    """Of one rank."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    """Of bigtrain and of the plain run, by step."""
    norms: list[tuple[float, float]] = field(default_factory=list)
    native: Counter[Collective] = field(default_factory=Counter)
    """Collectives of one step."""
    plain: Counter[Collective] = field(default_factory=Counter)
    missed: dict[tuple[str, ...], int] = field(default_factory=dict)
    """Collectives that were not seen, of either side."""
    ratios: dict[str, list[float]] = field(default_factory=lambda: {"bigtrain": [], "a_a": []})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"bigtrain": [], "plain": []})


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="bench_layouts", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs that are timed at each layout")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="which ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    result = bench(options.layouts, options.pairs)
    print(json.dumps(result) if options.json else table(result))


def bench(names: list[str], pairs: int, size: Size | None = None, pool: RankPool | None = None) -> dict[str, Any]:
    """Check and time layouts, each with `pairs` pairs of steps of each kind.

    Returns:
        Facts of the machine and the model; for each layout its collectives a step, the worst relative difference of
        losses, and for "bigtrain" and "a_a" the median ratio of a pair, its quartiles and the 95 % interval of the
        median; and whether the step is as cheap as it should be, null where the noise hides it.

    Raises:
        RuntimeError: The two sides do not compute the same, or not with the same collectives.
    """
    size = size or Size()
    ranks = pool or RankPool(RANKS)
    layouts = {}
    try:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            measured = ranks.run(measure, name, pairs, size, ranks=RANKS, timeout_s=TIMEOUT_S)
            layouts[name] = _judged(name, measured)
    finally:
        if pool is None:
            ranks.close()
    machine = this_machine(use_torch=True)
    return {
        "device": machine.device_name,
        "cores": os.cpu_count(),
        "ranks": RANKS,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": size.model.parameter_count(size.vocabulary),
        "tokens": size.batch * size.context,
        "pairs": pairs,
        "allowed": ALLOWED,
        "layouts": layouts,
    }


def measure(name: str, pairs: int, size: Size) -> Measured:
    """One layout on this rank. Collective."""
    case, measured = LAYOUTS[name], Measured()
    sizes = LayoutConfig(**case.native).mesh(dist.get_world_size())
    native, *plain = steps_of(case, sizes, size)
    for step in range(CHECKED_STEPS):
        mine, reference, _ = native(step), plain[0](step), plain[1](step)
        measured.losses.append((mine[0], reference[0]))
        measured.norms.append((mine[1], reference[1]))
    for run, counts in ((native, measured.native), (plain[0], measured.plain)):
        with RecordedCollectives(sizes) as record:
            run(CHECKED_STEPS)
        counts.update(record)
        measured.missed |= record.missed
    plain[1](CHECKED_STEPS)
    for number in range(WARMUP_ROUNDS + pairs):
        _round(CHECKED_STEPS + 1 + number, native, plain, measured)
    for values in (*measured.ratios.values(), *measured.seconds.values()):
        del values[:WARMUP_ROUNDS]
    return measured


def steps_of(case: Case, sizes: Mesh, size: Size) -> tuple[Step, Step, Step]:
    """bigtrain's step, and those of two plain runs, from the same weights on the same batches."""
    layout = LayoutConfig(**case.native, micro_size=1 if case.pipelined else None)
    engine: Any = FSDPConfig().build(
        size.model, size.vocabulary, OPTIMIZER,
        layout=layout, precision="fp32", seed=SEED, ranks=Ranks.from_environment(),
    )  # fmt: skip
    share = size.batch // sizes.data_parallel
    first = engine.data_parallel_rank * share
    weights = _weights(size)

    def native(step: int) -> tuple[float, float]:
        tokens, targets = (array[first : first + share].numpy() for array in _batch(size, step))
        whole: MicroBatch = {"tokens": tokens, "targets": targets}
        whole["weights"] = torch.ones(share, size.context).numpy()
        each = 1 if case.pipelined else share
        parts = [{key: array[at : at + each] for key, array in whole.items()} for at in range(0, share, each)]
        numbers = engine.train_step(step, parts, OPTIMIZER.lr).read()
        return numbers.loss / numbers.weight, numbers.gradient_norm

    def plain() -> Step:
        adam = {name: getattr(OPTIMIZER, name) for name in ("lr", "betas", "eps", "weight_decay")}
        run = Run(size.shape, case.plain, weights, size.context, share, **adam)

        def step(number: int) -> tuple[float, float]:
            tokens, targets = (array[first : first + share] for array in _batch(size, number))
            return run.step(tokens, targets, CLIP)

        return step

    return native, plain(), plain()


def _batch(size: Size, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, C) of a step, equal on all ranks; the same few sequences again and again can be learnt."""
    generator = torch.Generator().manual_seed(step % CHECKED_STEPS)
    stream = torch.randint(size.vocabulary, (size.batch, size.context + 1), generator=generator)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def _weights(size: Size) -> dict[str, Tensor]:
    """The initial weights that every layout has, by the plain model's names."""
    model = size.model.build(size.vocabulary)
    initialise(model, SEED)
    names = {"attention_norm": "norm_1", "mlp_norm": "norm_2", "query": "q", "key": "k", "value": "v", "output": "o"}
    renamed = {}
    for name, parameter in model.named_parameters():
        renamed[".".join(names.get(part, part) for part in name.split("."))] = parameter.detach().clone()
    return renamed


def _round(number: int, native: Step, plain: list[Step], measured: Measured) -> None:
    """A pair of bigtrain and a plain run, and a pair of plain runs."""
    pairs: list[tuple[str, list[Step]]] = [("bigtrain", [native, plain[0]]), ("a_a", [plain[1], plain[0]])]
    for kind, (one, other) in pairs:
        if number % 2:
            reference, mine = _timed(other, number), _timed(one, number)
        else:
            mine, reference = _timed(one, number), _timed(other, number)
        measured.ratios[kind].append(mine / reference)
        if kind == "bigtrain":
            measured.seconds["bigtrain"].append(mine)
            measured.seconds["plain"].append(reference)


def _timed(step: Step, number: int) -> float:
    dist.barrier()
    began = time.perf_counter()
    step(number)
    dist.barrier()
    return time.perf_counter() - began


def _judged(name: str, measured: list[Measured]) -> dict[str, Any]:
    """One layout's result, rank 0's times; all ranks have waited for each other."""
    for rank, found in enumerate(measured):
        if found.missed:
            raise RuntimeError(f"{name}, rank {rank}: collectives went unseen: {found.missed}")
        if found.native != found.plain:
            more, less = found.native - found.plain, found.plain - found.native
            raise RuntimeError(f"{name}, rank {rank}: bigtrain's own collectives {more}, the plain run's {less}")
    first = measured[0]
    off = [abs(mine / reference - 1) for mine, reference in [*first.losses, *first.norms]]
    worst = max(off)
    if not all(one <= SAME_LOSS for one in off):
        raise RuntimeError(f"{name}: losses and norms differ by {worst:.2g}: {first.losses}, {first.norms}")
    rows: dict[str, Any] = {kind: summary(ratios) for kind, ratios in first.ratios.items()}
    noise = max(abs(end - 1) for end in rows["a_a"]["interval"])
    return {
        "collectives": [{**asdict(one), "count": count} for one, count in sorted(first.native.items())],
        "difference": worst,
        "step_s": {side: round(sorted(values)[len(values) // 2], 5) for side, values in first.seconds.items()},
        **rows,
        "noise": round(noise, 5),
        # A measurement noisier than what it is to find says nothing.
        "within": None if noise > MAX_NOISE else rows["bigtrain"]["median"] - 1 <= ALLOWED + noise,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""

    def percent(ratio: float) -> str:
        return f"{100 * (ratio - 1):+.1f} %"

    def span(ends: list[float]) -> str:
        return " to ".join(percent(end) for end in ends)

    lines = [
        f"A step of {result['parameters'] / 1e6:.1f}M parameters on {result['tokens']:,} tokens in FP32, "
        f"{result['ranks']} ranks on {result['cores']} cores, {result['pairs']} pairs a layout",
        f"{result['device']}, load {result['load']}; torch {result['torch']}, Python {result['python']}",
        "",
        f"{'':12}{'bigtrain':>10}{'plain':>10}{'bigtrain / plain, 95 %':>30}{'plain / plain, 95 %':>30}",
    ]
    for name, row in result["layouts"].items():
        seconds = [f"{1000 * row['step_s'][side]:.0f} ms" for side in ("bigtrain", "plain")]
        ratios = [f"{percent(row[kind]['median'])} ({span(row[kind]['interval'])})" for kind in ("bigtrain", "a_a")]
        verdict = {True: "within", False: "MORE", None: "too noisy"}[row["within"]]
        lines.append(f"{name:12}{seconds[0]:>10}{seconds[1]:>10}{ratios[0]:>30}{ratios[1]:>30}  {verdict}")
    lines += [
        "",
        f"within: at most {100 * result['allowed']:.0f} % more than the plain layout, beyond the plain pairs' spread",
        "the same losses and gradient norms to 1e-5, and the same collectives of a step, exactly:",
    ]
    for name, row in result["layouts"].items():
        for place, one in enumerate(row["collectives"]):
            head = name if place == 0 else ""
            what = f"{one['kind']} over {' x '.join(one['axes'])}"
            lines.append(f"  {head:12}{one['count']:>4} x {what:40}{one['bytes']:>12,} bytes")
    return "\n".join(lines)


if __name__ == "__main__":
    # Under its own name, by which the ranks find its functions.
    from tests.bench import bench_layouts

    bench_layouts.main()
