"""Forks a run for each phase of a save, lets it kill itself there, and another that goes on; prints what each came to.

Arguments: a run's YAML, and a directory for the runs. What is printed is JSON: for each phase whether it was killed
there, a hash of the last state, and the logs of samples and losses.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.checkpoint.saver import PHASES
from bigtrain.heartbeat import Heartbeat, StopRequest
from bigtrain.run import RunDirectory, load_config
from bigtrain.storage import read_lines
from bigtrain.training.prepare import prepare
from bigtrain.training.session import Session

DIES_AT_SAVE = 2
"""The first save is whole, so that there is something to go on from."""


def train(config: Path, runs: Path, name: str, phase: str | None) -> None:
    """What a rank does, to the end, or to a phase of the second save."""
    saves = 0

    def hook(reached: str) -> None:
        nonlocal saves
        saves += reached == PHASES[0]
        if saves == DIES_AT_SAVE and reached == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    run = load_config(config, name=name)
    prepared = prepare(run)
    directory = RunDirectory(runs / name)
    directory.write(run, prepared.what)
    with Session(prepared, directory, Heartbeat.from_environment({}), StopRequest()) as session:
        session.saver._hook = hook
        session.train()


def in_a_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own; its status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def outcome(runs: Path, name: str, steps: int) -> dict[str, Any]:
    """Hashes of all that a run must come to."""
    directory = RunDirectory(runs / name)
    state = hashlib.sha256()
    for key, tensor in sorted(read_tensors(directory.checkpoints, steps, prefix="").items()):
        state.update(key.encode() + tensor.numpy().tobytes())
    rows = [(row["step"], row["loss"], row.get("val_loss")) for row in read_lines(directory.metrics)]
    left = sorted(path.name for path in directory.checkpoints.iterdir() if ".tmp-" in path.name or ".old-" in path.name)
    samples = list(read_lines(directory.samples))
    return {"state": state.hexdigest(), "losses": rows, "samples": samples, "left": left}


def main(config: Path, runs: Path) -> None:
    """Each phase, and a run that nothing disturbs."""
    torch.set_num_threads(1)
    steps = prepare(load_config(config)).total_steps
    report: dict[str, Any] = {}
    for phase in (None, *PHASES):
        name = phase or "undisturbed"
        status = in_a_child(lambda phase=phase, name=name: train(config, runs, name, phase))  # type: ignore[misc]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if phase is not None:
            again = in_a_child(lambda name=name: train(config, runs, name, None))  # type: ignore[misc]
            killed = killed and again == 0
        report[name] = {"killed": killed, **outcome(runs, name, steps)}
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
