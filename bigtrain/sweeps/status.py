"""The result of `bigtrain sweep status`, from the sweep's journal and the metrics of its trials."""

from __future__ import annotations

from typing import Any

from bigtrain.run import Lease
from bigtrain.sweeps.journal import SweepDirectory, SweepState, TrialRecord, read_state
from bigtrain.sweeps.results import saved_flops
from bigtrain.tracking.metrics import read_metrics


def sweep_status(directory: SweepDirectory) -> dict[str, Any]:
    """The status of a sweep, under the names that `--json` prints.

    Returns:
        Plain values for JSON. `state` is "running" while a driver runs, "waiting" if no driver runs and trials are left
        to run, "finished" if all trials are done, and "failed" otherwise. `undecided` lists the sizes for which no
        learning rate was chosen; with one of them the sweep is not "finished".
    """
    state = read_state(directory.journal)
    holder = Lease.holder(directory)
    alive = holder is not None and holder.alive()
    records = list(state.trials.values())
    rows = [_row(directory, record, alive) for record in records]
    own, separate = saved_flops([record.trial for record in records])
    done = sum(record.trial.own_flops for record in records if record.state == "finished")
    states = [row["state"] for row in rows]
    tuned = {record.trial.size for record in records if record.trial.kind == "tuning"}
    undecided = sorted(tuned - set(state.chosen))
    overall = "running" if alive else "waiting"
    if not alive and rows and not any(_goes_on(record, state) for record in records):
        overall = "finished" if all(map(state.complete, records)) and not undecided else "failed"
    return {
        "name": directory.name, "state": overall, "trials": rows,
        "finished": states.count("finished"), "failed": states.count("failed"), "refused": states.count("refused"),
        "flops": sum(record.trial.own_flops for record in records), "flops_done": done,
        "flops_saved": max(0.0, separate - own), "undecided": undecided, "law": (directory.law / "law.json").exists(),
    }  # fmt: skip


def _goes_on(record: TrialRecord, state: SweepState) -> bool:
    """Whether a driver would still run a trial; it does not run a trial whose trunk has failed."""
    if record.settled:
        return False
    parent = state.trials.get(record.trial.parent or "")
    return parent is None or parent.state == "finished" or _goes_on(parent, state)


def _row(directory: SweepDirectory, record: TrialRecord, alive: bool) -> dict[str, Any]:
    trial = record.trial
    state: str = record.state
    if state == "running" and not alive:
        state = "waiting"
    last: dict[str, Any] = {}
    if record.attempts:
        rows = read_metrics(directory.run(trial.name).metrics)
        last = rows[-1] if rows else {}
    return {
        "trial": trial.name, "kind": trial.kind, "state": state, "step": last.get("step", trial.parent_step),
        "steps": trial.steps, "params": trial.params, "tokens": trial.tokens, "lr": trial.lr, "seed": trial.seed,
        "loss": last.get("loss"), "val_loss": last.get("val_loss"), "attempts": record.attempts, "cause": record.cause,
    }  # fmt: skip
