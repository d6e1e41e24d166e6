"""Real runs on CPU processes, their rehearsals and the formulas: `python -m tests.bench.plan_rehearsals [NAME...]`.

For each layout: on how many ranks the rehearsed collectives are those of the real run, by kind, axes, bytes and count;
on how many parameters, gradients and optimizer take what the formulas say; the peak of the second step, and how far the
rehearsal and the formula are from it, on the rank where they are furthest.
"""

from __future__ import annotations

import argparse
import importlib
from collections import Counter
from typing import Any

from bigtrain.engines.config import ENGINES
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.hardware.cluster import cluster
from bigtrain.parallel.config import LayoutConfig
from bigtrain.planning.communication import Collective, Passes
from bigtrain.planning.estimate import Job
from bigtrain.planning.memory import Held, held_bytes
from bigtrain.planning.rehearsal.memory import TrackedMemory
from bigtrain.planning.rehearsal.ranks import Role, Seen, rehearsed
from bigtrain.planning.rehearsal.recorded import RecordedCollectives
from bigtrain.testing.equivalence import LR, How, What, build, micro_batches, section
from bigtrain.testing.ranks import RankPool

_LLAMA = {"arch": "llama", "layers": 4, "width": 256, "heads": 8, "kv_heads": 4, "mlp_width": 704}
_SIZES: dict[str, Any] = {"context": 256, "vocabulary": 4096, "batch": 32}
FP32 = What(_LLAMA, **_SIZES)
BF16 = What(_LLAMA, **_SIZES, precision="bf16")
TIED = What({**_LLAMA, "tied": True}, **_SIZES)
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
ALL_GATHER = {"cp": 2, "cp_kind": "all_gather"}
INTERLEAVED = {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}
CASES = {
    "one process": (FP32, How(1, micro_size=4)),
    "one process, bf16, recompute": (BF16, How(1, {}, FULL, micro_size=4)),
    "dp2": (FP32, How(2, micro_size=4)),
    "dp2, selective": (FP32, How(2, {}, SELECTIVE, micro_size=4)),
    "dp4, bf16, recompute": (BF16, How(4, {}, FULL, micro_size=4)),
    "hsdp2x2": (TIED, How(4, {"dp_replicate": 2}, micro_size=4)),
    "tp2": (FP32, How(2, {"tp": 2}, micro_size=4)),
    "tp2 x dp2": (FP32, How(4, {"tp": 2}, micro_size=4)),
    "cp2 ulysses": (FP32, How(2, {"cp": 2}, micro_size=4)),
    "cp2 all_gather x dp2": (FP32, How(4, ALL_GATHER, micro_size=4)),
    "pp2": (FP32, How(2, {"pp": 2}, micro_size=4)),
    "pp2 interleaved": (FP32, How(2, INTERLEAVED, micro_size=4)),
    "tp2 x pp2, tied": (TIED, How(4, {"tp": 2, "pp": 2}, micro_size=4)),
    "dp8": (FP32, How(8, micro_size=4)),
    "hsdp2x4, bf16": (BF16, How(8, {"dp_replicate": 2}, micro_size=2)),
    "tp2 x dp4, recompute": (FP32, How(8, {"tp": 2}, FULL, micro_size=4)),
    "tp2 x cp2 x dp2": (FP32, How(8, {"tp": 2, "cp": 2}, micro_size=4)),
    "pp4 x dp2, tied": (TIED, How(8, {"pp": 4}, micro_size=4)),
    "tp2 x pp2 x dp2, selective": (FP32, How(8, {"tp": 2, "pp": 2}, SELECTIVE, micro_size=4)),
}


def passes_of(what: What, how: How) -> Passes:
    """The micro-batches of a rank."""
    batch = micro_batches(what, how, 0, 0, LayoutConfig(**how.layout).mesh(how.ranks).data_parallel)
    return Passes(len(batch), *batch[0]["tokens"].shape)


def role_of(what: What, how: How) -> Role:
    """What `equivalence.build` builds, for a rehearsal."""
    from bigtrain.optim.config import OPTIMIZERS

    engine = ENGINES.read(how.engine)
    assert isinstance(engine, FSDPConfig)
    return Role(
        section(what),
        what.vocabulary,
        OPTIMIZERS.read({"lr": LR, "clip": what.clip, "frozen": what.frozen, **what.optimizer}),
        engine,
        LayoutConfig(**how.layout, micro_size=how.micro_size),
        what.precision,
        what.seed,
        what.documents,
        how.ranks,
        passes_of(what, how),
    )


def seen_on(role: Role, rank: int) -> Seen:
    """One rank's rehearsal."""
    with rehearsed(role, rank) as seen:
        return seen


def measured(what: What, how: How) -> tuple[Counter[Collective], dict[str, int], Held]:
    """The collectives, the peak and the states of this rank's second step."""
    engine, sizes = build(what, how), LayoutConfig(**how.layout).mesh(how.ranks)
    place = engine.data_parallel_rank, engine.data_parallel_size
    held = {}
    with TrackedMemory() as memory:
        held["parameters"] = memory.hold("parameters", engine.model.parameters())

        def before_update(*_: Any) -> None:
            held["gradients"] = memory.hold("gradients", (one.grad for one in engine.model.parameters()))

        engine.optimizer.register_step_pre_hook(before_update)
        engine.train_step(0, micro_batches(what, how, 0, *place), LR)
        states = (value for state in engine.optimizer.state.values() for value in state.values())
        held["optimizer"] = memory.hold("optimizer", states)
        memory.begin()
        with RecordedCollectives(sizes) as record:
            engine.train_step(1, micro_batches(what, how, 1, *place), LR)
    engine.close()
    return Counter(record), memory.peak(), Held(**held)


def job_of(what: What, how: How) -> Job:
    """The same for the formulas."""
    engine: Any = ENGINES.read(how.engine)
    layout = LayoutConfig(**how.layout, micro_size=how.micro_size)
    model: Any = section(what)
    return Job(model, what.vocabulary, what.batch, engine, layout, what.precision, what.documents)


def row(name: str, pool: RankPool) -> str:
    """One layout's line."""
    what, how = CASES[name]
    role, job = role_of(what, how), job_of(what, how)
    sizes, passes = job.layout.mesh(how.ranks), passes_of(what, how)
    equal = exact = 0
    worst = {"rehearsed": 0.0, "formula": 0.0}
    most = issued = 0
    for rank, (collectives, peak, held) in enumerate(pool.run(measured, what, how, ranks=how.ranks, timeout_s=900)):
        seen = seen_on(role, rank)
        equal += Counter(seen.collectives) == collectives
        promised = held_bytes(
            job.model,
            job.vocab_size,
            engine=job.engine,
            sizes=sizes,
            layout=job.layout,
            rank=rank,
            precision=job.precision,
        )
        exact += held == promised == seen.held
        formula = job.memory(sizes, passes, sizes.coordinates(rank)["pp"], cluster("cpu"))
        most, issued = max(most, peak["total"]), max(issued, sum(collectives.values()))
        for kind, value in (("rehearsed", seen.peak["total"]), ("formula", formula.total)):
            error = value / peak["total"] - 1
            worst[kind] = max(worst[kind], error, key=abs)
    return (
        f"{name:30} {how.ranks:5}  {issued:11} {f'{equal} of {how.ranks}':>8} {f'{exact} of {how.ranks}':>8} "
        f"{most / 2**20:8.2f} MiB {worst['rehearsed']:+10.1%} {worst['formula']:+9.1%}"
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="Layouts; all by default.")
    names = parser.parse_args().names or list(CASES)
    print(
        f"{'layout':30} {'ranks':>5}  {'collectives':>11} {'equal on':>8} {'exact on':>8} {'peak':>12} "
        f"{'rehearsed':>10} {'formula':>9}"
    )
    for ranks in sorted({CASES[name][1].ranks for name in names}):
        with RankPool(ranks) as pool:
            for name in names:
                if CASES[name][1].ranks == ranks:
                    print(row(name, pool), flush=True)


if __name__ == "__main__":
    # By its name: ranks import the functions that they run.
    importlib.import_module("tests.bench.plan_rehearsals").main()
