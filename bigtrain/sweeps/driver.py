"""`bigtrain sweep run`: plans the missing trials, runs them in slots in the order of the plan, and fits the law.

The driver has one thread. It writes each event to the journal before it acts on it, so a driver that was killed at any
moment resumes where it was. The sweep's lease refuses a second driver, and each run's lease a second launcher.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from bigtrain import storage
from bigtrain.checkpoint import commit
from bigtrain.config import UserError
from bigtrain.jobs.causes import BACKOFF_FIRST_S, BACKOFF_MOST_S
from bigtrain.jobs.controller import StopSwitch, saved_step
from bigtrain.jobs.processes import signal_name
from bigtrain.run import ExitCode, Lease
from bigtrain.signals import STOP_SIGNALS, on_hangup, on_signals
from bigtrain.streams import enduring
from bigtrain.sweeps.config import SizeConfig
from bigtrain.sweeps.cost import require_budget
from bigtrain.sweeps.display import SweepDisplay
from bigtrain.sweeps.journal import FORMAT_VERSION, Journal, SweepDirectory, TrialRecord
from bigtrain.sweeps.ladder import Rung, rung
from bigtrain.sweeps.load import Sweep
from bigtrain.sweeps.memory import least_memory_bytes
from bigtrain.sweeps.record import check_same, sizes_of, write_record
from bigtrain.sweeps.results import between_trials_s, diverged, fit_law, row_of, saved_flops, write_runs
from bigtrain.sweeps.slots import RunningTrial, TrialStarter, starter_of
from bigtrain.sweeps.trials import Trial, config_text, grid_trials, lengths, trial_config, tuning_trials
from bigtrain.tracking.history import newest, read_events
from bigtrain.tracking.numbers import span

LOOK_S = 0.05


def run_sweep(sweep: Sweep, runs_dir: Path, stream: TextIO, starter: TrialStarter | None = None) -> int:
    """Run a sweep to its end; a sweep that was started before is resumed.

    Args:
        sweep: The sweep.
        runs_dir: The directory that holds the sweep's directory.
        stream: Where progress is printed.
        starter: The slots that run the trials; None: the slots of the sweep's section `slots`.

    Returns:
        An exit code of `ExitCode`: 0 if every trial has finished, 1 if a trial failed or was refused or a size has no
        learning rate, 75 if the sweep was stopped.

    Raises:
        UserError: The sweep's file, its directory or its data are wrong, or the sweep would exceed its budget. Raised
            before the first trial starts.
    """
    directory = SweepDirectory(runs_dir / sweep.config.name)
    check_same(sweep, directory)
    rungs = {size.params: (size, rung(sweep, size)) for size in sizes_of(sweep)}
    for size, one in rungs.values():
        lengths(sweep, size, one)
    starter = starter or starter_of(sweep)
    starter.check()
    display = SweepDisplay(directory, enduring(stream))
    ladder = {target: one for target, (_, one) in rungs.items()}
    require_budget(sweep, sizes_of(sweep), ladder, directory, starter, display.say)
    lease = Lease.acquire(directory, noun="sweep")
    try:
        lease.keep()
        driver = Driver(sweep, directory, rungs, starter, display)
        return driver.run()
    finally:
        lease.release()


@dataclass
class _Slot:
    """The trial that runs in a slot."""

    trial: Trial
    process: RunningTrial
    saved_step: int
    """Step of the trial's newest checkpoint when the trial was started."""


@dataclass
class _Wait:
    """The times before which crashed trials are not started again."""

    until: dict[str, float] = field(default_factory=dict)
    """Time of the monotonic clock in seconds, by the name of the trial."""

    def over(self, name: str) -> bool:
        return time.monotonic() >= self.until.get(name, 0.0)


class Driver:
    """The loop that runs the trials of one sweep. The caller holds the sweep's lease."""

    def __init__(
        self, sweep: Sweep, directory: SweepDirectory, rungs: dict[int, tuple[SizeConfig, Rung]],
        starter: TrialStarter, display: SweepDisplay,
    ) -> None:  # fmt: skip
        self._sweep, self._directory, self._rungs = sweep, directory, rungs
        self._starter, self._display = starter, display
        self._switch = StopSwitch()
        self._announced = 0
        self._slots: dict[int, _Slot] = {}
        self._wait = _Wait()
        self._undecided: set[int] = set()
        """Sizes whose learning rate could not be chosen."""
        self._changed = True
        """Whether a trial has ended since trials were last planned."""
        self._journal = Journal(directory.journal)

    @property
    def _records(self) -> dict[str, TrialRecord]:
        return self._journal.state.trials

    def run(self) -> int:
        """Run all trials of the sweep, and return the exit code; see `run_sweep`."""
        write_record(self._sweep, self._directory)
        if not self._directory.journal.exists():
            self._journal.append("created", format_version=FORMAT_VERSION, sweep=self._directory.name)
        self._again()
        self._plan()
        self._say_start()
        shown = self._display.shown(self._journal.state, self._starter.slots)
        with (
            contextlib.closing(self._starter),
            on_signals(self._switch.press, *STOP_SIGNALS),
            on_hangup(self._switch.press_first),
            shown,
        ):
            while True:
                self._reap()
                level = self._pass_on_stop()
                if level == 0:
                    if self._changed:
                        self._plan()
                    self._fill()
                if not self._slots and (level or not self._waits()):
                    break
                self._display.update({slot: one.trial for slot, one in self._slots.items()})
                time.sleep(LOOK_S)
        write_runs(self._directory, self._journal.state)
        return self._conclude()

    def _again(self) -> None:
        """Mark trials as waiting that were running when the last driver ended, or that were stopped."""
        for record in self._records.values():
            if record.state in ("running", "stopped"):
                record.state = "waiting"

    def _plan(self) -> None:
        """Plan the trials that are still missing, now that more learning rates may be known."""
        self._changed = False
        for target, (size, one) in self._rungs.items():
            lr = self._rate(target, one)
            if lr is None:
                continue
            seeds = size.seeds or self._sweep.config.seeds
            steps = lengths(self._sweep, size, one)
            self._add(grid_trials(self._sweep, one, lr, seeds, steps, self._journal.state.planned()), one)

    def _rate(self, target: int, one: Rung) -> float | None:
        """The learning rate of a size; None until it is chosen, or if it cannot be chosen."""
        if self._sweep.config.learning_rates is None:
            return one.lr
        chosen = self._journal.state.chosen.get(target)
        if chosen is not None or target in self._undecided:
            return chosen
        wanted = tuning_trials(self._sweep, one)
        self._add([trial for trial in wanted if trial.name not in self._records], one)
        records = [self._records[trial.name] for trial in wanted]
        if not all(record.settled for record in records):
            return None
        losses = [self._tuning_loss(record) for record in records]
        obstacle = self._obstacle(target, wanted, records, losses)
        if obstacle is not None:
            self._undecided.add(target)
            self._display.say(f"size {target}: no grid is trained: {obstacle}")
            return None
        best = min(range(len(losses)), key=lambda index: losses[index] or 0.0)
        known = [loss if loss is not None and math.isfinite(loss) else None for loss in losses]
        self._journal.append("chose", size=target, lr=wanted[best].lr, losses=known)
        self._display.say(f"size {target}: learning rate {wanted[best].lr:g}")
        return wanted[best].lr

    def _tuning_loss(self, record: TrialRecord) -> float | None:
        """Held-out loss of a tuning trial: infinite if it diverged, None if it failed for another reason."""
        if record.result is not None:
            return float(record.result["val_loss"])
        return math.inf if diverged(self._directory, record) else None

    def _obstacle(
        self, target: int, trials: list[Trial], records: list[TrialRecord], losses: list[float | None]
    ) -> str | None:
        """The reason why no learning rate can be chosen from these losses, with a remedy; None if one can be chosen."""
        for trial, record, loss in zip(trials, records, losses, strict=True):
            if loss is None:
                return (
                    f"the learning rate {trial.lr:g} was not tried: {record.cause}; "
                    f"`bigtrain sweep retry {self._directory.name} {trial.name}` tries it again"
                )
            if math.isinf(loss):
                self._display.say(f"size {target}: the learning rate {trial.lr:g} diverged")
        best = min(range(len(losses)), key=lambda index: losses[index] or 0.0)
        if math.isinf(losses[best] or 0.0):
            return "all learning rates diverged; add smaller ones to learning_rates.factors"
        if best in (0, len(losses) - 1):
            edge, way = ("smallest", "smaller") if best == 0 else ("largest", "larger")
            return (
                f"the best learning rate, {trials[best].lr:g}, is the {edge} tried; add {way} ones to "
                "learning_rates.factors and run the sweep again"
            )
        return None

    def _add(self, trials: list[Trial], one: Rung) -> None:
        """Write new trials to the journal; refuse trials that can never fit, and trials whose parent is refused."""
        for trial in trials:
            config = trial_config(self._sweep, one, trial)
            self._directory.configs.mkdir(parents=True, exist_ok=True)
            storage.write_atomic(self._directory.configs / f"{trial.name}.yaml", config_text(config))
            self._journal.append("planned", trial=trial.plain())
            parent = self._records.get(trial.parent or "")
            cause = parent.cause if parent is not None and parent.state == "refused" else None
            cause = cause or self._starter.refusal(config, least_memory_bytes(config, one.vocab_size))
            if cause is not None:
                self._journal.append("refused", trial=trial.name, cause=cause)
                self._display.say(f"{trial.name} is refused: {cause}")

    def _fill(self) -> None:
        """Start trials that are ready in the free slots."""
        for slot in range(self._starter.slots):
            if slot in self._slots:
                continue
            record = next((one for one in self._records.values() if self._ready(one)), None)
            if record is None:
                return
            trial = record.trial
            config = self._directory.configs / f"{trial.name}.yaml"
            self._journal.append("started", trial=trial.name, attempt=record.attempts + 1, slot=slot)
            saved = saved_step(self._directory.run(trial.name).path)
            process = self._starter.start(config, self._directory.trials, self._directory.log(trial.name), slot)
            self._slots[slot] = _Slot(trial, process, saved)
            self._display.say(f"slot {slot}: {trial.name}, steps {max(saved, trial.parent_step)} to {trial.steps}")

    def _ready(self, record: TrialRecord) -> bool:
        trial = record.trial
        if record.state != "waiting" or not self._wait.over(trial.name):
            return False
        if trial.parent is None:
            return True
        checkpoints = self._directory.run(trial.parent).checkpoints
        return commit.find_checkpoint(checkpoints, trial.parent_step) is not None

    def _waits(self) -> bool:
        """Whether a trial may still become ready."""
        return any(record.state == "waiting" and self._hopeful(record.trial) for record in self._records.values())

    def _hopeful(self, trial: Trial) -> bool:
        if trial.parent is None:
            return True
        parent = self._records[trial.parent]
        if commit.find_checkpoint(self._directory.run(trial.parent).checkpoints, trial.parent_step) is not None:
            return True
        return parent.state in ("waiting", "running") and self._hopeful(parent.trial)

    def _reap(self) -> None:
        for slot, one in list(self._slots.items()):
            code = one.process.poll()
            if code is not None:
                del self._slots[slot]
                self._changed = True
                self._end(one, code)

    def _end(self, one: _Slot, code: int) -> None:
        trial = one.trial
        if code == ExitCode.FINISHED:
            row = row_of(self._directory, trial, self._rungs[trial.size][1])
            if row is not None or trial.kind == "trunk":
                self._journal.append("finished", trial=trial.name, result=row or {})
                write_runs(self._directory, self._journal.state)
                loss = f", held-out loss {row['val_loss']:.4f}" if row else ""
                self._display.say(f"{trial.name}: finished{loss}")
                return
            self._fail(trial, code, "it has no held-out loss at its last step", 0)
        elif code == ExitCode.STOPPED:
            self._journal.append("ended", trial=trial.name, code=code, cause="stopped on request", retry=False)
        elif code < 0 or code > 128:
            self._crashed(one, code)
        else:
            self._fail(trial, code, self._cause(trial), 0)

    def _crashed(self, one: _Slot, code: int) -> None:
        """Restart or fail a trial whose launcher a signal ended. The launcher itself handles failures of ranks."""
        trial, record = one.trial, self._records[one.trial.name]
        number = -code if code < 0 else code - 128
        cause = f"its launcher was killed by {signal_name(number)}"
        progressed = saved_step(self._directory.run(trial.name).path) > one.saved_step
        failures = 1 if progressed else record.failures + 1
        limit = self._sweep.config.slots.max_failures
        if failures > limit:
            self._fail(trial, code, f"{cause}; {failures} times without a new checkpoint", failures)
            return
        delay = 0.0 if failures == 1 else min(BACKOFF_FIRST_S * 2 ** (failures - 2), BACKOFF_MOST_S)
        self._wait.until[trial.name] = time.monotonic() + delay
        self._journal.append("ended", trial=trial.name, code=code, cause=cause, retry=True, failures=failures)
        self._display.say(f"{trial.name}: {cause}; it is restarted")

    def _fail(self, trial: Trial, code: int, cause: str, failures: int) -> None:
        self._journal.append("ended", trial=trial.name, code=code, cause=cause, retry=False, failures=failures)
        self._display.say(
            f"{trial.name}: failed: {cause}; see `bigtrain sweep logs {self._directory.name} {trial.name}`"
        )

    def _cause(self, trial: Trial) -> str:
        """Why a run failed, in one line: the cause in the run's events, else an error or the last line in its log."""
        events = [
            event
            for event in read_events(self._directory.run(trial.name).events)
            if event["event"] in ("failed", "fault")
        ]
        said = newest(events, "cause")
        lines = self._directory.log(trial.name).read_text(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return str(said) if said else errors[-1] if errors else lines[-1] if lines else "it ended without a message"

    def _pass_on_stop(self) -> int:
        """Pass a request to stop on to the trials, once for each level; returns the level.

        The loop does this because a signal handler must not.
        """
        level = self._switch.level
        while self._announced < level:
            self._announced += 1
            now = self._announced == 2
            if now:
                self._display.say("ending all trials at once")
            else:
                self._display.say("stopping: the trials save and exit; Ctrl-C again ends them at once")
            for one in self._slots.values():
                one.process.stop(now)
        return level

    def _say_start(self) -> None:
        trials = self._journal.state.planned()
        own, separate = saved_flops(trials)
        done = sum(record.state == "finished" for record in self._records.values())
        text = f"{self._directory.name}: {len(trials)} trials, {self._starter.slots} at once"
        if done:
            text += f"; {done} have finished"
        if separate:
            text += f"; trunks and branches take {own:.3g} FLOPs, separate runs would {separate:.3g}"
        self._display.say(text)

    def _conclude(self) -> int:
        """Report the result, fit the law unless the sweep was stopped, and return the exit code."""
        if self._switch.level:
            self._display.say(
                f"{self._directory.name}: stopped; `bigtrain sweep resume {self._directory.name}` continues it"
            )
            return ExitCode.STOPPED
        gaps = between_trials_s(self._directory)
        if gaps:
            self._display.say(
                f"between two trials on a slot: {statistics.median(gaps):.1f} s (median of {len(gaps)}), from the end "
                "of one to the first step of the next"
            )
        own, separate = saved_flops([one.trial for one in self._records.values() if one.state == "finished"])
        if separate:
            self._display.say(f"FLOPs: {own:.3g}, {1 - own / separate:.0%} less than separate runs' {separate:.3g}")
        wanted = self._sweep.config.target
        trial = next(iter(self._records.values())).trial
        tracking = trial_config(self._sweep, self._rungs[trial.size][1], trial).tracking
        began = time.monotonic()
        fitted = fit_law(
            self._directory, wanted.flops if wanted else None, tracking.model_copy(update={"facts": {}})
        )  # fmt: skip
        if isinstance(fitted, str):
            self._display.say(f"no law: {fitted}")
        else:
            self._display.say(f"the law is in {self._directory.law}, fitted in {span(time.monotonic() - began)}")
        left = [record for record in self._records.values() if not self._journal.state.complete(record)]
        if self._undecided or left:
            for target in sorted(self._undecided):
                self._display.say(f"  size {target}: no learning rate was chosen, so its grid is missing")
            for record in left:
                self._display.say(
                    f"  {record.trial.name}: {record.state}: {record.cause or 'its trunk does not exist'}"
                )
            return ExitCode.FAILED
        self._display.say(f"{self._directory.name}: finished")
        return ExitCode.FINISHED


def let_retry(directory: SweepDirectory, trial: str) -> None:
    """Let the next driver run a trial again that has failed or was refused.

    Raises:
        UserError: There is no trial of this name, it has neither failed nor been refused, or a driver holds the sweep.
    """
    lease = Lease.acquire(directory, noun="sweep")
    try:
        journal = Journal(directory.journal)
        record = journal.state.get(trial)
        if record.state not in ("failed", "refused"):
            raise UserError(f"The trial '{trial}' is {record.state}, so it cannot be retried", str(directory.path))
        journal.append("retry", trial=trial)
    finally:
        lease.release()
