"""Faults of ranks on this machine, and stops: no Ray."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.bench.faults.left import Leavings
from tests.bench.faults.measured import Measured, Results
from tests.bench.faults.run import HANG_LIMIT_S, ROOT, Run, config_of
from tests.bench.faults.say import say


def bench_ranks(place: Path, faults: int, results: Results) -> None:
    """P1, P2, P4, P7 and P10 in place."""
    run, left = started(place, "ranks", results)
    try:
        for number, (promise, sent) in [(n, kind) for n in range(faults) for kind in (("P1", 9), ("P2", 19))]:
            run.settle()
            left.note()
            victim = run.pid(1)
            struck = run.about_to_be_struck()
            os.kill(victim, sent)
            seen = run.recovered(struck, results, results["P10 rank"] if promise == "P1" else Measured())
            results[promise].add(seen - (HANG_LIMIT_S if promise == "P2" else 0.0))
            left.look()
            say(promise, number, faults, f"seen after {seen:.2f} s")
    finally:
        run.end()
    left.look_at_the_end()


def bench_stops(place: Path, faults: int, results: Results) -> None:
    """P4 of stops: SIGTERM to the command, which saves and ends; the same command goes on."""
    run, left = started(place, "stops", results)
    try:
        run.settle()
        for number in range(faults):
            run.process.send_signal(signal.SIGTERM)
            code = run.process.wait(120)
            if code != 75:
                raise RuntimeError(f"the stopped run ended with {code}: {run.log.read_text()[-2000:]}")
            done, known = run.last_step(), len(run.events("resumed"))
            left.look_at_the_end()
            run.start()
            resumed = run.until(lambda known=known: run.events("resumed")[known:])[0]["step"]
            results["P4 stop"].add(done - resumed)
            say("P4 stop", number, faults, f"stopped after step {done}, went on after {resumed}")
            run.until(lambda resumed=resumed: run.last_step() > resumed + 7)
            time.sleep(0.1)
    finally:
        run.end()


def started(place: Path, name: str, results: Results) -> tuple[Run, Leavings]:
    """A run of two ranks, with a directory of its own for temporary files."""
    temporary = place / f"tmp-{name}"
    temporary.mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    run = Run(place, name, config_of(place, HANG_LIMIT_S), ["2"], env)
    return run, Leavings(run, temporary, results["P7"])
