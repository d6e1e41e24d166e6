"""A soak: a run of two ranks under seeded faults for a while, held against an undisturbed run of the same YAML.

    python -m tests.bench.soak --faults kills --minutes 30 --every 15       fault case 34
    python -m tests.bench.soak --faults all --minutes 60 --every 20         all kinds that one machine can have

A small model is trained by `bigtrain train`, its shards streamed from a web server of this process into a small cache,
a step a third of a second. Faults strike at random moments, about every --every seconds; a strike waits only where no
checkpoint was published since the last but one, since a run that never saves is to end (job.max_failures). After
--minutes the run is stopped and finished, and a run that nothing disturbs, from the disk and at full speed, does the
same steps. Both must end with 0, with the same bits of weights and optimizer, the same samples and the same losses,
each step once. An event with a cause of one line must report every visible fault. Nothing may be left over, and nothing
may have grown. It exits with 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from bigtrain.run import ExitCode
from bigtrain.tracking.goodput import goodput
from bigtrain.tracking.history import read_columns, read_events
from tests.bench.soak_faults import ALL, KILLS, LAUNCHER_ENDED, Fault, move_the_clock
from tests.bench.soak_run import GONE_S, NAME, Place, Soaked, marked
from tests.bench.soak_watch import Watch
from tests.data.faulty_server import serving
from tests.training.die_in_a_save import outcome

UNDISTURBED: Final = "undisturbed"
MORE_STEPS: Final = 10
"""Taken after the stop, so that the run comes to an end of its own."""
REPORTED_S: Final = 900.0
"""How long the event that reports a fault may take: most of it is a start on a busy machine."""
SILENCE: Final = re.compile(r" hangs in phase |nothing was heard for")
"""Causes of faults that a machine brings about which others keep busy: nobody planted them, and they prove nothing."""
SAMPLE_S: Final = 2.0
NEVER_PLANTED: Final = ("unsaved", "replicas_differ", "save_refused")


@dataclass
class Soak:
    """Faults, one after another, and what became of each."""

    run: Soaked
    kinds: dict[Fault, int]
    chance: random.Random
    every_s: float
    struck: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    reported: int = 0
    """Faults that an event reported."""
    round: list[Fault] = field(default_factory=list)
    expected: Counter[str] = field(default_factory=Counter)
    """How often each pattern of a cause was to be seen among the faults."""

    def disturb(self, seconds: float) -> None:
        """Faults until the time is over."""
        deadline = time.monotonic() + seconds
        last_but_one = last = self.run.saves()
        while True:
            time.sleep(min(max(0.0, deadline - time.monotonic()), self.chance.uniform(0.5, 1.5) * self.every_s))
            if time.monotonic() >= deadline:
                return
            self.run.until(lambda least=last_but_one: self.run.saves() > least)
            last_but_one, last = last, self.run.saves()
            self.strike()

    def strike(self) -> None:
        """Cause one fault, and print the line that describes it."""
        if not self.round:
            # A round of all kinds, in random order: none is absent for long.
            self.round = [kind for kind, often in self.kinds.items() for _ in range(often)]
            self.chance.shuffle(self.round)
        fault = self.round.pop()
        name = fault.__name__.replace("_", " ")
        known = {event: len(self.run.events(event)) for event in ("fault", "fallback", "save_failed", "stopped")}
        began = time.monotonic()
        done, event, pattern = fault(self.run, self.chance)
        self.struck[name] += 1
        cause = ""
        if event == "fault":
            self.expected[re.sub(r"^rank \d+|process \d+", ".*", pattern)] += 1
        elif event == "fallback":
            # Its launcher was killed first.
            self.expected[LAUNCHER_ENDED.format(".*")] += 1
        if event:
            found = self._reported(event, known[event], pattern)
            cause = f" -> {event}: {found}" if found is not None else " -> NOT REPORTED"
            self.reported += found is not None
            if found is None:
                self.problems.append(f"no event '{event}' reports: {name} {done}")
            elif "\n" in found:
                self.problems.append(f"the cause is more than a line: {found!r}")
        print(f"{time.strftime('%H:%M:%S')} {name} {done} ({time.monotonic() - began:.1f} s){cause}", flush=True)

    def _reported(self, event: str, known: int, pattern: str) -> str | None:
        """The cause that an event names; None where none comes."""
        deadline = time.monotonic() + REPORTED_S
        while time.monotonic() < deadline:
            for found in self.run.events(event)[known:]:
                if re.search(pattern, found.get("cause", "")):
                    return str(found.get("cause", ""))
            if self.run.process.poll() is not None:
                raise RuntimeError(f"the launcher exited with {self.run.process.returncode}")
            time.sleep(0.02)
        return None


def finish(run: Soaked, place: Place) -> int:
    """Stop the run, let it end, and do the same steps undisturbed; returns how many."""
    code = run.stop()
    if code != ExitCode.STOPPED:
        raise RuntimeError(f"`bigtrain train` exited with {code} at its stop, and not with {ExitCode.STOPPED.value}")
    steps = int(run.checkpoints()[-1].name[5:]) + MORE_STEPS
    run.start(f"duration={steps} steps", paced=False)
    code = run.process.wait()
    if code != ExitCode.FINISHED:
        raise RuntimeError(f"`bigtrain train` exited with {code} at the end")
    shards = place.path / "shards"
    data = f"data={{train: {shards / 'train'}, validation: {shards / 'validation'}, shuffle_window: 2}}"
    subprocess.run(
        run.command(f"duration={steps} steps", data, "--name", UNDISTURBED),
        cwd=place.path, env=place.environment(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return steps


def compare(place: Place, steps: int) -> tuple[str, list[str]]:
    """A line about the two runs, and how they differ or what they have left."""
    faulty, undisturbed = (outcome(place.path / "runs", name, steps) for name in (NAME, UNDISTURBED))
    problems = [
        f"{key} differ from those of the undisturbed run" for key in undisturbed if faulty[key] != undisturbed[key]
    ]
    if [row[0] for row in faulty["losses"]] != list(range(1, steps + 1)):
        problems.append("metrics.jsonl does not hold each step once")
    if [row["step"] for row in faulty["samples"]] != list(range(1, steps + 1)):
        problems.append("samples.jsonl does not hold each step once")
    problems += [f"left behind: {path}" for path in (place.path / "runs" / NAME).rglob("*.tmp-*")]
    problems += [f"left behind: {path}" for path in (place.path / "tmp").rglob("*")]
    deadline = time.monotonic() + GONE_S
    while (left := marked(place.path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    problems += [f"process {pid} is left behind" for pid in left]
    same = "bit-identical to the undisturbed run" if not problems else "NOT the undisturbed run"
    line = f"{steps} steps, state {faulty['state'][:16]}, undisturbed {undisturbed['state'][:16]}: {same}"
    return line, problems


def unplanted(soak: Soak, events: list[dict[str, Any]]) -> list[str]:
    """Causes of faults that nobody planted."""
    left = soak.expected.copy()
    strange = []
    for cause in (event["cause"] for event in events if event["event"] == "fault"):
        pattern = next((pattern for pattern in left if left[pattern] and re.search(pattern, cause)), None)
        if pattern is None:
            strange.append(cause)
        else:
            left[pattern] -= 1
    return strange


def report(soak: Soak, place: Place) -> list[str]:
    """Lines about faults, restarts and goodput."""
    run = place.path / "runs" / NAME
    events = read_events(run / "events.jsonl")
    spent = goodput(events, read_columns(run / "metrics.jsonl"), 0.0)
    counts = Counter(event["event"] for event in events)
    strange = [f"{event['event']}: {event.get('cause')}" for event in events if event["event"] in NEVER_PLANTED]
    extra = unplanted(soak, events)
    silences = [cause for cause in extra if SILENCE.search(cause)]
    soak.problems += strange + [f"a fault that nobody planted: {cause}" for cause in extra if cause not in silences]
    planted = sum(soak.struck.values())
    return [
        f"{planted} faults: {', '.join(f'{count} {name}' for name, count in sorted(soak.struck.items()))}",
        f"{soak.reported} of them had to be reported and were, each by a cause of one line; in events.jsonl "
        f"{counts['fault']} faults, {counts['fallback']} fallbacks, {counts['save_failed']} failed saves, "
        f"of them {len(silences)} silences beyond a limit that nobody planted, on a machine that others use",
        f"{counts['restarted']} restarts in place, {soak.run.launches - 2} starts of the launcher after the first, "
        f"{counts['saved']} checkpoints",
        str(spent),
    ]


def soak_at(path: Path, arguments: argparse.Namespace, seed: int) -> list[str]:
    """Soak in a directory; prints what is found, and returns what is wrong."""
    place = Place(path)
    kinds = dict(KILLS if arguments.faults == "kills" else ALL)
    if place.clock is None:
        kinds.pop(move_the_clock, None)
    with serving(path / "shards") as server:
        run = Soaked(place, server)
        try:
            # As many checkpoints as are kept, so that all is there that a run holds.
            run.until(lambda: run.saves() > 3)
            watch = Watch(run, SAMPLE_S)
            soak = Soak(run, kinds, random.Random(seed), arguments.every)
            try:
                soak.disturb(60 * arguments.minutes)
            finally:
                watch.close()
            server.always = None
            steps = finish(run, place)
        except (RuntimeError, OSError) as error:
            log = run.log.read_text(errors="replace")[-3000:]
            return [f"{type(error).__name__}: {error}\n{log}\n{json.dumps(run.events('fault', 'failed')[-3:])}"]
        finally:
            run.end()
    line, problems = compare(place, steps)
    table, grown = watch.judge()
    print("\n".join(["", *report(soak, place), line, *table]), flush=True)
    return soak.problems + problems + grown


def main() -> int:
    """Soak, print, and say by the exit code whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", choices=("kills", "all"), default="all")
    parser.add_argument("--minutes", type=float, default=60.0, help="time under faults")
    parser.add_argument("--every", type=float, default=20.0, metavar="S", help="seconds between faults, about")
    parser.add_argument("--seed", type=int, help="of kinds and moments; by default a random one, which is printed")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new directory for it, which is not removed")
    arguments = parser.parse_args()
    # So that a soak that is ended takes its run along.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"$ python -m tests.bench.soak --faults {arguments.faults} --minutes {arguments.minutes:g} --every "
          f"{arguments.every:g} --seed {seed}")  # fmt: skip
    print(f"{platform.machine()}, {cores} cores, load {load:.1f} before; torch {torch.__version__}, "
          f"Python {platform.python_version()}\n", flush=True)  # fmt: skip
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True)
        problems = soak_at(arguments.keep.resolve(), arguments, seed)
    else:
        with tempfile.TemporaryDirectory(prefix="bigtrain-soak-") as directory:
            problems = soak_at(Path(directory), arguments, seed)
    print("\n".join(["", *(f"BROKEN: {problem}" for problem in problems)]) if problems else "\nall held")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
