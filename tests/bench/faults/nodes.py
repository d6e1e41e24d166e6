"""Faults of nodes: one Ray cluster for all of a kind, to which a node is added after each loss."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.bench.faults.left import Leavings
from tests.bench.faults.measured import Measured, Results
from tests.bench.faults.run import ROOT, Run, config_of
from tests.bench.faults.say import say
from tests.jobs.test_ray import RayNodes

NOTICE_S: Final = 20


@contextmanager
def running(place: Path, name: str, sizes: str, results: Results) -> Iterator[tuple[RayNodes, Run, Leavings]]:
    """A run of one rank on each of as many nodes of a cluster as `sizes` allows; three nodes are there."""
    temporary = place / f"tmp-{name}"
    temporary.mkdir()
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(temporary)  # The nodes inherit it, and their agents and ranks from them.
    nodes = RayNodes(3)
    try:
        env = nodes.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = Run(place, name, config_of(place), ["1", f"ray:{nodes.address}", sizes], env)
        left = Leavings(run, temporary, results["P7"], nodes.directory)
        try:
            yield nodes, run, left
        finally:
            run.end()
        left.look_at_the_end()
    finally:
        nodes.end()
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def bench_nodes(place: Path, faults: int, results: Results) -> None:
    """P3, P4, P7, P10 with another node; and drains."""
    with running(place, "nodes", "2", results) as (nodes, run, left):
        for number, kind in [(n, kind) for n in range(faults) for kind in ("P3 killed", "P3 silent", "P4 notice")]:
            nodes.do("ensure 3")
            run.settle()
            left.note()
            if kind == "P4 notice":
                seen = _drain(nodes, run, results)
                left.look()
            else:
                seen = _lose(nodes, run, 1, kind, results, results["P10 node"], left)
                results[kind].add(seen)
            say(kind, number, faults, f"seen after {seen:.2f} s")


def bench_fewer(place: Path, faults: int, results: Results) -> None:
    """P10 and P4 where no node is spare: three nodes, two, and three again."""
    chance = random.Random("fewer")
    with running(place, "fewer", "2,3", results) as (nodes, run, left):
        for number in range(faults):
            run.settle()
            left.note()
            seen = _lose(nodes, run, chance.randrange(3), "P3 killed", results, results["P10 fewer"], left)
            results["P3 killed"].add(seen)
            placed = run.events("placed")[-1]["nodes"]
            if placed != 2:
                raise RuntimeError(f"the run went on with {placed} nodes")
            known = run.known()
            nodes.do("ensure 3")
            _, _, done, resumed = run.resumption(known)
            results["P4 growth"].add(done - resumed)
            say(
                "P10 fewer", number, faults, f"seen after {seen:.2f} s; grew after step {done}, went on after {resumed}"
            )


def _lose(
    nodes: RayNodes, run: Run, rank: int, kind: str, results: Results, recovery: Measured, left: Leavings
) -> float:
    """Take the node of a rank away; seconds until that was seen."""
    node, agent = _node_of(run, rank)
    struck = run.about_to_be_struck()
    if kind == "P3 silent":
        os.kill(agent, signal.SIGSTOP)
    nodes.do(f"{'kill' if kind == 'P3 killed' else 'stop'} {node}")
    seen = run.recovered(struck, results, recovery if kind == "P3 killed" else Measured())
    left.look()
    if kind == "P3 silent":
        nodes.do(f"kill {node}")
    return seen


def _drain(nodes: RayNodes, run: Run, results: Results) -> float:
    """Have Ray announce that a node goes; seconds until the run has heard of it."""
    node, _ = _node_of(run, 1)
    announced = run.about_to_be_struck()
    known = run.known()
    nodes.do(f"drain {node} {NOTICE_S}")
    heard = run.until(lambda: run.events("notice")[known["notice"] :])[0]["time"]
    restarted, loaded, done, resumed = run.resumption(known)
    if faults := run.events("fault")[known["fault"] :]:
        raise RuntimeError(f"a drain became a fault: {faults}")
    run.until(lambda: run.last_step() > resumed)
    stepped = time.time()
    nodes.do(f"kill {node}")  # As was announced.
    results["P4 notice"].add(done - resumed)
    results["notice"].add(stepped - announced)
    results["notice"].add_parts(
        heard=heard - announced,
        saved=restarted - heard,
        placed_and_loaded=loaded - restarted,
        first_step=stepped - loaded,
    )
    return heard - announced


def _node_of(run: Run, rank: int) -> tuple[str, int]:
    """The start of the id of a rank's node, and the process id of its agent."""
    environment: dict[str, Any] = run.environment(rank)
    agent = int(Path(f"/proc/{environment['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    return environment["BIGTRAIN_PLACEMENT"][:16], agent
