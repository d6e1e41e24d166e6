"""Forks a process for each phase of a save and lets it kill itself there; prints what each left, as JSON.

Arguments: a directory; the name of a phase's directory is the phase.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import PHASES, Saver

FACTS = {"progress": {}, "config_hash": "", "identity": ""}


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((1000,), value)}


def die_in(directory: Path, phase: str, saved_before: list[int], step: int) -> None:
    """Save some steps, then die in `phase` of saving one more."""

    def hook(reached: str) -> None:
        if armed and reached == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    armed = False
    saver = Saver(directory, CheckpointConfig(keep_last=2), phase_hook=hook)
    for before in saved_before:
        saver.save(before, state(before), **FACTS)
    saver.wait()
    armed = True
    saver.save(step, state(-step), **FACTS)
    saver.wait()


def main() -> None:
    root = Path(sys.argv[1])
    report = {}
    for phase in PHASES:
        for case, step in (("new", 3), ("again", 2)):
            directory = root / f"{phase}-{case}"
            child = os.fork()
            if child == 0:
                die_in(directory, phase, [1, 2], step)
                os._exit(1)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            newest, warnings = commit.newest_verified(directory)
            Saver(directory, CheckpointConfig(keep_last=2)).close()
            report[directory.name] = {
                "killed": killed,
                "newest": newest,
                "warnings": warnings,
                "newest_after_cleaning": commit.newest_verified(directory)[0],
                "left": sorted(entry.name for entry in directory.iterdir()),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
