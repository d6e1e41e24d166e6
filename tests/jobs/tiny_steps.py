"""Steps of tiny ranks that keep step with each other, agree on when to stop, and go on from what was saved."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def saved(run: Path) -> int:
    """The step that was saved last."""
    try:
        return int((run / "checkpoints" / "LATEST").read_text().split("_")[1])
    except (FileNotFoundError, IndexError):
        return 0


def go(
    run: Path,
    page: Any,
    last: int,
    at: Callable[[int], None] = lambda step: None,
    pause_s: float = 0.02,
    save_s: float = 0.0,
) -> None:
    """Do each step up to `last`, noting it in steps_RANK; save and exit with 75 when asked to."""
    rank, world, attempt = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "BIGTRAIN_ATTEMPT"))
    (run / f"node_{attempt}_{rank}").write_text(os.environ["BIGTRAIN_PLACEMENT"][:8])
    with open(run / f"steps_{rank}", "a") as steps:
        for step in range(saved(run) + 1, last + 1):
            page.beat(step, "step")
            steps.write(f"{attempt} {step} {world} {time.monotonic()}\n")
            steps.flush()
            at(step)
            # What rank 0 was asked is what all do, as a reduction would have it.
            if rank == 0:
                _replace(run / f"asked_{attempt}", f"{step} {int(page.control())}")
            _replace(run / f"at_{rank}_{attempt}", str(step))
            for other in range(world):
                while _number(run / f"at_{other}_{attempt}") < step:
                    time.sleep(0.002)
            number, word = (run / f"asked_{attempt}").read_text().split()
            if word == "1" and int(number) == step:
                page.beat(step, "stopping")
                time.sleep(save_s)
                if rank == 0:
                    (run / "checkpoints").mkdir(exist_ok=True)
                    _replace(run / "checkpoints" / "LATEST", f"step_{step:08d}\n")
                sys.exit(75)
            time.sleep(pause_s)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.rename(path)
