"""`bigtrain train` with faults: `python faulty_train.py CONFIG NAME NPROC [WHERE SIZES [SCRIPT]]`.

Ranks are `bigtrain.testing.faults`. WHERE is "ray:ADDRESS", or letters: machines of `bigtrain.testing.machines`. There
the run is placed at the numbers of nodes that SIZES names ("2,3"), with NPROC ranks each. SCRIPT says what happens to
machines, in lines of `STEP lose X`, `STEP return X` and `STEP drain X SECONDS`, done once that step is logged.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.jobs import membership, train
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.launch import launch_here, run_controlled
from bigtrain.run import load_config
from bigtrain.testing.machines import Machines
from bigtrain.tracking.metrics import last_step

if TYPE_CHECKING:
    from bigtrain.jobs.placers.ray import RayPlacer

RANK = "bigtrain.testing.faults"


def main() -> int:
    """Train; returns the run's exit code."""
    config = load_config(Path(sys.argv[1]), [], name=sys.argv[2])
    procs = int(sys.argv[3])
    if len(sys.argv) == 4:
        train.launch_here = lambda path, **options: launch_here(path, rank_module=RANK, **options)
        return int(train.train(config, Path("runs"), procs=procs))
    sizes = tuple(int(size) for size in sys.argv[5].split(","))
    logs = Path("runs", sys.argv[2], "logs").absolute()
    elastic = config.job.model_copy(update={"nodes": max(sizes), "min_nodes": min(sizes), "procs_per_node": procs})
    placer = (
        on_ray(sys.argv[4], elastic, logs) if sys.argv[4].startswith("ray:") else Machines(sys.argv[4], sizes, logs)
    )
    if isinstance(placer, Machines):
        membership.GROW_AFTER_S = 0.1
        lines = [line.split() for line in "".join(sys.argv[6:]).split(";")]
        threading.Thread(target=play, args=(placer, lines, logs.parent / "metrics.jsonl"), daemon=True).start()

    def launch(path: Path, *, nproc: int, job: Any, sizes: Any, **options: Any) -> int:
        return run_controlled(path, placer, nproc=procs, job=elastic, rank_module=RANK, **options)

    train.launch_here = launch
    code = int(train.train(config, Path("runs"), procs=procs))
    if isinstance(placer, Machines):
        print("placements", *placer.placements)
    return code


def on_ray(where: str, job: JobConfig, logs: Path) -> RayPlacer:
    """The placer of a Ray cluster."""
    import ray

    from bigtrain.jobs.placers.ray import RayPlacer
    from bigtrain.run import RunDirectory

    ray.init(address=where.removeprefix("ray:"), log_to_driver=False, logging_level="ERROR")
    return RayPlacer(job, logs=logs, say=print, on_event=RunDirectory(logs.parent).event)


def play(machines: Machines, script: list[list[str]], metrics: Path) -> None:
    """Do to the machines what the script says."""
    for step, action, node, *rest in filter(None, script):
        while (last_step(metrics) or 0) < int(step):
            time.sleep(0.01)
        if action == "lose":
            machines.lose(node)
        elif action == "return":
            machines.there.append(node)
        else:
            machines.leaving[node] = float(rest[0])


if __name__ == "__main__":
    sys.exit(main())
