"""The launcher process of a slot of this machine: `python -m bigtrain.sweeps.launcher SLOT PROCS [PLUGIN]`.

Its standard input is a socket to the sweep's driver. For each trial the driver sends a line of JSON, {config, runs_dir,
log}, and receives a line with the trial's exit code. A trial is trained as by `bigtrain train`, but its agent stays
alive for the next trial. SIGTERM asks the trial to save and exit; a second SIGTERM asks it to exit at once. The
launcher exits when the driver closes the socket.
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
    """Train the trials that the driver sends, until it closes the socket.

    Args:
        train_one: A function that trains a trial and returns its exit code.
        keep: A function that keeps the agents alive. It is called several times a second between two trials, and must
            not block.
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
    """Append all further output of this process, and of the processes that it starts, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class SlotOfThisMachine:
    """Trains trials as `bigtrain train` does, with an agent that stays alive between them."""

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
    """Serve the driver that started this process, and return the exit code."""
    slot = SlotOfThisMachine(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
    try:
        serve(lambda trial: slot.gang.train(trial, sys.stderr), lambda: slot.gang.keep(0.0))
    finally:
        slot.gang.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
