"""A sweep's driver whose trials are real processes without torch: `tiny_driver.py SWEEP.yaml RUNS_DIR`.

Run as `tiny_driver.py --slot` it is a slot's process, which trains such trials: one "trains" a step in some
milliseconds, saves itself where `checkpoint.at` says, every five steps and when it is asked to stop, resumes from its
newest save, and writes down every step that it takes. At step 12 it waits while there is a file `hold` in its runs
directory. A learning rate above 0.9 diverges. That it never runs beside itself is held by a lock.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.sweeps.gang import GangTrial

STEP_S = 0.005
SAVE_EVERY = 5
BEST_LR = 0.003
HOLD_AT = 12
SHORT = 17
"""Tokens that the last sequence of an epoch is short of."""


def trial(order: GangTrial) -> int:
    import yaml

    runs_dir = order.runs_dir
    config = yaml.safe_load(order.config.read_text())
    run = runs_dir / config["name"]
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    with open(run / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (run / "twice").touch()
            return 1
        (run / "pid").write_text(str(os.getpid()))
        return steps(order, config, run)


def steps(order: GangTrial, config: dict[str, Any], run: Path) -> int:
    runs_dir = order.runs_dir
    if config["optimizer"]["lr"] > 0.9:
        print("error: the loss of step 3 is nan", flush=True)
        return 1
    total = int(config["duration"].split()[0])
    at = {int(one.split()[0]) for one in config["checkpoint"]["at"]}
    source = config["init"]["source"]
    step = int(source.rpartition("@")[2]) if source else 0
    if source and not (runs_dir / source.rpartition("@")[0] / "checkpoints" / f"step_{step:08d}").is_dir():
        print("error: the trunk has no such step", flush=True)
        return 2
    latest = run / "checkpoints" / "LATEST"
    if latest.exists():
        step = int(latest.read_text().removeprefix("step_"))
    with open(run / "events.jsonl", "a") as events:
        events.write(json.dumps({"time": time.time(), "event": "started", "step": step}) + "\n")
    while step < total and not order.is_stopping:
        time.sleep(STEP_S)
        if step == HOLD_AT and (runs_dir / "hold").exists():
            continue
        step += 1
        loss = 2.0 + 3.0 / math.log(10 + step)
        row = {"step": step, "tokens": 256 * step - SHORT, "loss": loss, "tokens_per_s": 1000.0}
        if step == total:
            row["val_loss"] = loss + 1e-3 * abs(math.log(config["optimizer"]["lr"] / BEST_LR))
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps(row) + "\n")
        if step in at or step == total or step % SAVE_EVERY == 0:
            save(run, step)
    if step < total:
        save(run, step)
        return 75
    with open(run / "events.jsonl", "a") as events:
        events.write(json.dumps({"time": time.time(), "event": "finished", "step": step}) + "\n")
    return 0


def save(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step:08d}").mkdir(exist_ok=True)
    (run / "checkpoints" / "LATEST.tmp").write_text(f"step_{step:08d}")
    (run / "checkpoints" / "LATEST.tmp").rename(run / "checkpoints" / "LATEST")


def drive(sweep: Path, runs_dir: Path) -> int:
    from bigtrain.config import UserError
    from bigtrain.sweeps.driver import run_sweep
    from bigtrain.sweeps.load import load_sweep
    from bigtrain.sweeps.slots import LocalSlots

    class TinySlots(LocalSlots):
        def command(self, slot: int) -> list[str]:
            return [sys.executable, __file__, "--slot"]

    loaded = load_sweep(sweep)
    try:
        return int(run_sweep(loaded, runs_dir, sys.stderr, TinySlots(loaded.config.slots)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    if sys.argv[1] == "--slot":
        from bigtrain.sweeps.launcher import serve

        serve(trial, lambda: None)
        sys.exit()
    sys.exit(drive(Path(sys.argv[1]), Path(sys.argv[2])))
