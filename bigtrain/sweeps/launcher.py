"""The process of a slot of this machine: `python -m bigtrain.sweeps.launcher SLOT PROCS [PLUGIN]`.

Its standard input is a socket to the sweep's driver, which sends a line of JSON for each trial, {config, runs_dir,
log}, and gets a line back with the trial's code. A trial is trained as `bigtrain train` would, but the agent stays for
the next one. SIGTERM asks the trial to stop, a second one to end at once. The process ends when the socket does.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from bigtrain.checkpoint.restore import bring_back
from bigtrain.config.plugin import load_plugin
from bigtrain.jobs.launch import launch_here
from bigtrain.jobs.placers.local import LocalPlacer
from bigtrain.jobs.train import train
from bigtrain.run import load_config
from bigtrain.sweeps.gang import LOOK_S, Gang, GangTrial, KeptPlacer


def serve(train_one: Callable[[GangTrial], int], keep: Callable[[], None]) -> None:
    """Train the trials that the driver requests, until it closes the socket.

    Args:
        train_one: Trains a trial that may be asked to stop; returns its code.
        keep: Called several times a second between two trials; does not wait.
    """
    orders = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    running: list[GangTrial] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        for trial in running:
            trial.stop(now=False)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    heard = b""
    with orders, selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        while True:
            if not selector.select(LOOK_S):
                keep()
                continue
            more = orders.recv(1 << 16)
            if not more:
                return
            *lines, heard = (heard + more).split(b"\n")
            for line in lines:
                order = json.loads(line)
                trial = GangTrial(Path(order["config"]), Path(order["runs_dir"]), Path(order["log"]))
                print_into(trial.log)
                running.append(trial)
                code = train_one(trial)
                running.clear()
                orders.sendall(b"%d\n" % code)


def print_into(log: Path) -> None:
    """Have all that this process prints, and what it starts, go to a file, after what is there."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class SlotOfThisMachine:
    """What `bigtrain train` does, with an agent that stays."""

    def __init__(self, slot: int, procs: int, plugin: str | None) -> None:
        self._slot, self._procs, self._plugin = slot, procs, plugin
        self.gang = Gang(self._train)

    def _train(self, gang: Gang, trial: GangTrial, stream: TextIO) -> int:
        if self._plugin is not None:
            load_plugin(self._plugin)
        config = load_config(trial.config)
        if config.checkpoint.storage is not None and (done := bring_back(config, trial.runs_dir)):
            print(done, file=stream)

        def launch(path: Path, *, event: Any, say: Any, **options: Any) -> int:
            placer = gang.placer(lambda: self._placer(trial))
            placer.begin(say, event)
            return launch_here(path, event=event, say=say, kept=placer, around=trial.heard, **options)

        return train(config, trial.runs_dir, procs=self._procs, stream=stream, launch=launch)

    def _placer(self, trial: GangTrial) -> KeptPlacer:
        return KeptPlacer(lambda say, event: LocalPlacer(trial.log.parent / f"agent_{self._slot}.log"))


def main() -> int:
    """Serve the driver that started this process."""
    slot = SlotOfThisMachine(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
    try:
        serve(lambda trial: slot.gang.train(trial, sys.stderr), lambda: slot.gang.keep(0.0))
    finally:
        slot.gang.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
