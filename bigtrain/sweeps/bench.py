"""Measured tokens per second of each size, from the first steps of its trial in the sweep's slots.

The measured runs have the trial's config, engine and loader, the same number of ranks and threads, and run in all slots
at the same time. The results are cached in the sweep's directory, under a key of everything that they depend on.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain import storage
from bigtrain.hardware.this_machine import this_machine
from bigtrain.run import RunConfig, RunDirectory
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.ladder import Rung
from bigtrain.sweeps.load import Sweep
from bigtrain.sweeps.slots import RunningTrial, TrialStarter
from bigtrain.sweeps.trials import config_text, grid_trials, label, trial_config
from bigtrain.tracking.metrics import read_metrics

FORMAT_VERSION = 1
MEASURED_FLOPS = 1e11
"""FLOPs of the measured steps of one size, some seconds of work for one CPU core."""
MIN_STEPS, MAX_STEPS, WARM_STEPS = 8, 60, 3
LIMIT_S = 600.0


@dataclass(frozen=True)
class Speed:
    """The speed of the trials of one size."""

    tokens_per_s: float
    start_s: float
    """Seconds that a trial takes in addition to its steps: for its start, its last checkpoint and its end."""


def measure(
    sweep: Sweep, rungs: Sequence[Rung], directory: SweepDirectory, starter: TrialStarter, say: Callable[[str], None]
) -> dict[int, Speed]:
    """Measure the speed of each size that is not in the cache.

    Args:
        sweep: The sweep.
        rungs: The sizes.
        directory: The sweep's directory, which holds the cache.
        starter: The slots that run the measured steps.
        say: A function that prints a line of progress.

    Returns:
        Speeds by target N; without the sizes that could not be measured.
    """
    known = _read(directory.bench)
    configs = {one.target: _config(sweep, one) for one in rungs}
    keys = {target: _key(config, sweep, starter.slots) for target, config in configs.items()}
    missing = [one for one in rungs if keys[one.target] not in known]
    if missing:
        starter.check()
        say(f"measuring tokens a second of {len(missing)} sizes, {starter.slots} at once")
        place = Path(tempfile.mkdtemp(prefix="bigtrain-sweep-bench-"))
        try:
            for target, speed in _run(missing, configs, place, starter, say).items():
                known[keys[target]] = {"tokens_per_s": speed.tokens_per_s, "start_s": speed.start_s}
        finally:
            shutil.rmtree(place, ignore_errors=True)
        directory.path.mkdir(parents=True, exist_ok=True)
        storage.write_json(directory.bench, {"format_version": FORMAT_VERSION, "speeds": known})
    return {target: Speed(**known[key]) for target, key in keys.items() if key in known}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        return dict(value["speeds"]) if value["format_version"] <= FORMAT_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # It is only a cache, so the speeds are measured again.


def _config(sweep: Sweep, one: Rung) -> RunConfig:
    """The config of the measured steps: a short trial without W&B, that evaluates one sequence."""
    steps = round(MEASURED_FLOPS / (one.flops_per_token * one.batch_tokens))
    steps = min(max(steps, MIN_STEPS), MAX_STEPS)
    trial = grid_trials(sweep, one, one.lr, (0,), (steps,))[0]
    config = trial_config(sweep, one, trial)
    schedule = type(config.schedule)(name=config.schedule.name)
    tracking = config.tracking.model_copy(update={"wandb": "disabled", "every": config.tracking.every.steps(1)})
    evaluation = config.evaluation.model_copy(update={"sequences": 1})
    return config.model_copy(
        update={"name": label(one.target), "schedule": schedule, "tracking": tracking, "evaluation": evaluation}
    )


def _key(config: RunConfig, sweep: Sweep, slots: int) -> str:
    machine = this_machine()
    plain = config.plain()
    parts = {
        "config": {key: plain[key] for key in ("model", "batch", "precision", "engine", "layout", "optimizer")},
        "slots": [sweep.config.slots.on, slots, sweep.config.slots.procs, sweep.config.slots.threads],
        "machine": [machine.hostname, machine.device_name, machine.n_devices, machine.cores],
        "torch": importlib.metadata.version("torch"),
    }
    return storage.hash_text(json.dumps(parts, sort_keys=True))


def _run(
    rungs: Sequence[Rung], configs: dict[int, RunConfig], place: Path, starter: TrialStarter, say: Callable[[str], None]
) -> dict[int, Speed]:
    waiting = [one.target for one in rungs]
    running: dict[int, tuple[int, RunningTrial, float]] = {}
    found: dict[int, Speed] = {}
    deadline = time.monotonic() + LIMIT_S * len(rungs)
    try:
        while waiting or running:
            for slot in range(starter.slots):
                if slot not in running and waiting:
                    target = waiting.pop(0)
                    path = place / f"{label(target)}.yaml"
                    storage.write_atomic(path, config_text(configs[target]))
                    began = time.time()
                    process = starter.start(path, place / "runs", place / f"{label(target)}.log", slot)
                    running[slot] = (target, process, began)
            for slot, (target, process, began) in list(running.items()):
                code = process.poll()
                if code is not None or time.monotonic() > deadline:
                    del running[slot]
                    speed = _speed(RunDirectory(place / "runs" / label(target)), began) if code == 0 else None
                    if speed is None:
                        log = (place / f"{label(target)}.log").read_text(errors="replace").strip().splitlines()
                        say(f"{label(target)} could not be measured: {log[-1] if log else 'no message'}")
                        process.stop(now=True)
                    else:
                        found[target] = speed
            time.sleep(0.05)
    finally:
        for _, process, _ in running.values():
            process.stop(now=True)
    return found


def _speed(run: RunDirectory, began: float) -> Speed | None:
    rows = read_metrics(run.metrics)
    rates = [row["tokens_per_s"] for row in rows[WARM_STEPS:-1]]
    if not rates:
        return None
    rate = float(statistics.median(rates))
    return Speed(rate, max(0.0, time.time() - began - rows[-1]["tokens"] / rate))
