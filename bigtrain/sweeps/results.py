"""The results of finished trials: a row for each trial, the files of rows, and the fitted law."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain import storage
from bigtrain.config import UserError
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from bigtrain.sweeps.journal import SweepDirectory, SweepState, TrialRecord, results
from bigtrain.sweeps.ladder import Rung
from bigtrain.sweeps.trials import PHASES, Trial
from bigtrain.tracking.config import TrackingConfig
from bigtrain.tracking.history import read_events
from bigtrain.tracking.metrics import read_metrics
from bigtrain.tracking.numbers import finite

if TYPE_CHECKING:
    from bigtrain.scaling.fit import Fitted

_NOT_A_NUMBER = re.compile(r"BadStepsError|\bnan\b|\binf\b|not finite|no held-out loss", re.IGNORECASE)
"""Matches the causes of failure of runs whose loss diverged."""
MIN_RUNS = 6
"""Least number of finished runs to which a law is fitted."""


def row_of(directory: SweepDirectory, trial: Trial, rung: Rung) -> dict[str, Any] | None:
    """The row of a trial whose run has finished; None if the run has no held-out loss at its last step.

    Losses are in nats per token. `flops` counts all steps from step 0, including those of the trunk. `tokens` is the
    run's own count, as in its tracker. The last sequence of an epoch may be shorter than the others, so a run over
    several epochs trains on fewer tokens than its steps times the tokens of a batch.
    """
    rows = read_metrics(directory.run(trial.name).metrics)
    last = rows[-1] if rows else {}
    if last.get("step") != trial.steps or last.get("val_loss") is None:
        return None
    tokens = int(last["tokens"])
    places = min(rung.batch_sequences * trial.steps, rung.sequences_per_epoch) * rung.context
    return {
        "run": trial.name, "group": trial.group, "kind": trial.kind, "phase": PHASES[trial.kind], "seed": trial.seed,
        "params": trial.params, "params_without_embeddings": trial.params_without_embeddings,
        "params_total": trial.params_total, "tokens": tokens, "unique_tokens": min(tokens, places),
        "flops": trial.flops, "flops_6nd": FLOPS_PER_PARAMETER_TOKEN * trial.params * tokens, "lr": trial.lr,
        "beta2": rung.beta2, "batch_tokens": rung.batch_tokens, "warmup_steps": rung.warmup_steps,
        "steps": trial.steps, "val_loss": last["val_loss"], "train_loss": last.get("loss"),
        "parent": trial.parent, "parent_step": trial.parent_step, "own_flops": trial.own_flops,
    }  # fmt: skip


def diverged(directory: SweepDirectory, record: TrialRecord) -> bool:
    """Whether a trial failed because its loss was not finite, and not for an external reason."""
    if record.state != "failed":
        return False
    rows = read_metrics(directory.run(record.trial.name).metrics)
    last = rows[-1] if rows else {}
    losses = [last.get(key) for key in ("loss", "val_loss") if key in last]
    return any(finite(loss) is None for loss in losses) or _NOT_A_NUMBER.search(record.cause or "") is not None


def write_runs(directory: SweepDirectory, state: SweepState) -> None:
    """Write the files of rows anew: the finished branches, and the trials that tuned a learning rate, if any."""
    rows = results(state.trials.values())
    storage.write_atomic(directory.runs, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    tuned = [row for record in state.trials.values() if (row := _tuning_row(directory, record)) is not None]
    if tuned:
        storage.write_atomic(directory.tuning, "".join(json.dumps(row, allow_nan=False) + "\n" for row in tuned))


def _tuning_row(directory: SweepDirectory, record: TrialRecord) -> dict[str, Any] | None:
    """The row of a tuning trial: its result, or a row without a loss if it diverged; None for all other trials."""
    trial = record.trial
    if trial.kind != "tuning":
        return None
    if record.result is not None:
        return record.result
    if not diverged(directory, record):
        return None
    return {
        "run": trial.name, "group": trial.group, "kind": trial.kind, "seed": trial.seed, "params": trial.params,
        "tokens": trial.tokens, "flops": trial.flops, "lr": trial.lr, "batch_tokens": trial.tokens // trial.steps,
        "val_loss": None,
    }  # fmt: skip


def saved_flops(trials: list[Trial]) -> tuple[float, float]:
    """FLOPs of the sweep's trunks and branches, and FLOPs of the same runs if each were trained from step 0."""
    own = sum(trial.own_flops for trial in trials if trial.kind != "tuning")
    return own, sum(trial.flops for trial in trials if trial.kind == "branch")


def fit_law(directory: SweepDirectory, target_flops: float | None, tracking: TrackingConfig) -> Fitted | str:
    """Fit a law to the finished runs, write it into the sweep's law/, and record it as a W&B run.

    Returns:
        The fit, or the reason why no law can be fitted.
    """
    count = sum(1 for _ in storage.read_lines(directory.runs))
    if count < MIN_RUNS:
        return f"{count} finished runs have no law: {MIN_RUNS} are needed"
    from bigtrain.scaling.fit import fit
    from bigtrain.scaling.options import FitOptions
    from bigtrain.scaling.report import write_outputs

    try:
        fitted = fit(str(directory.path), FitOptions(target_flops=target_flops))
    except UserError as error:
        return error.what
    write_outputs(fitted, directory.law, tracking=tracking)
    return fitted


def between_trials_s(directory: SweepDirectory) -> list[float]:
    """Seconds between the end of a run and the first step of the next run in the same slot, for each such pair."""
    slots: dict[int, list[str]] = {}
    for line in storage.read_lines(directory.journal):
        if line.get("event") == "started":
            slots.setdefault(int(line["slot"]), []).append(line["trial"])
    found = []
    for names in slots.values():
        spans = [_span(directory.run(name).events) for name in names]
        for before, after in itertools.pairwise(spans):
            if before is not None and after is not None and after[0] >= before[1]:
                found.append(after[0] - before[1])
    return found


def _span(events: Path) -> tuple[float, float] | None:
    """Times of a run's first step and of its end, in seconds; None if an event is missing."""
    known = read_events(events)
    first = next((event["time"] for event in known if event["event"] in ("started", "resumed")), None)
    last = next((event["time"] for event in reversed(known) if event["event"] == "finished"), None)
    return None if first is None or last is None else (first, last)
