"""The loop: what it calls, in which order, and what it does with votes, ends and failures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint.config import BestConfig
from bigtrain.config import UserError
from bigtrain.data.loader import StepBatch
from bigtrain.engines.contract import StepNumbers
from bigtrain.engines.step import StepReducer
from bigtrain.optim.schedules.constant import ConstantConfig
from bigtrain.run import RunDirectory
from bigtrain.tracking.metrics import read_units
from bigtrain.training.bad_steps import BadStepsError, Policy, RollBack
from bigtrain.training.best import KeepBest
from bigtrain.training.boundaries import Boundaries
from bigtrain.training.callback import Callback, Step
from bigtrain.training.callbacks.device import DeviceMetrics
from bigtrain.training.config import CALLBACKS, BadStepsConfig
from bigtrain.training.evaluation import Evaluated
from bigtrain.training.logs import MetricsLog
from bigtrain.training.loop import (
    VOTE_SAVE,
    VOTE_STOP,
    Outcome,
    Trainer,
    UnsavedError,
)
from bigtrain.training.progress import Progress, as_plain, from_plain

SEQUENCES = 4
LR = 0.5


@dataclass(frozen=True)
class Result:
    """The numbers of a step, noting when they are read."""

    numbers: StepNumbers
    note: Callable[[], None]

    def read(self) -> StepNumbers:
        self.note()
        return self.numbers


@dataclass
class World:
    """A tiny engine, loader, control, saver and evaluation that write down what the loop does with them.

    Step n (from 1) has the loss sum n * 10 over n tokens, so that every mean is 10 and every sum tells its steps.
    """

    total: int = 6
    evaluate_every: int | None = None
    save_every: int | None = None
    votes: dict[int, float] = field(default_factory=dict)
    """What the ranks vote in the steps that have a vote, from 1."""
    losses: dict[int, float] = field(default_factory=dict)
    loader_fails_at: int | None = None
    loader_ends_at: int | None = None
    saves_succeed: bool = True
    last_save_is_safe: bool = True
    held_out: list[float | None] = field(default_factory=list)
    """Losses of the evaluations in turn; 3 afterwards."""
    bad_steps: BadStepsConfig = BadStepsConfig(limit=2, then="stop")  # noqa: RUF009 - frozen
    first: int = 0
    warmup: int = 0
    log: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """The learning rates that steps were taken with."""
    data_wait_s: float = 0.25
    reducer: StepReducer = field(default_factory=lambda: StepReducer(torch.device("cpu")))

    def train_step(self, step: int, micro_batches: list[Any], lr: float, vote: float = 0.0) -> Result:
        done = step + 1
        self.rates.append(lr)
        self.log.append(f"step {done}")
        loss = self.losses.get(done, 10.0 * done)
        numbers = StepNumbers(loss, float(done), 1.0, vote, skipped=float(not math.isfinite(loss)))
        return Result(numbers, lambda: self.log.append(f"read {done}"))

    def batches(self, first_step: int) -> Iterator[StepBatch]:
        step = first_step
        while self.loader_ends_at is None or step < self.loader_ends_at:
            if self.loader_fails_at == step:
                raise OSError("the disk is gone")
            yield StepBatch(step, [])
            step += 1

    def beat(self, step: int, phase: str) -> None:
        # Of these two there is one of each a step.
        if phase not in ("step", "data"):
            self.log.append(f"{phase} phase at {step}")

    def vote(self) -> float:
        done = max([self.first] + [int(line.split()[1]) for line in self.log if line.startswith("step")]) + 1
        return self.votes.get(done, 0.0)

    def evaluate(self) -> Evaluated:
        self.log.append("evaluate")
        return Evaluated({"val_loss": self.held_out.pop(0) if self.held_out else 3.0})

    def save(self, progress: Progress) -> bool:
        self.log.append(f"save {progress.step}")
        return self.saves_succeed

    def roll_back(self, asked: RollBack) -> Progress | None:
        self.log.append(f"roll back from {asked.step} to {asked.wanted}")
        if asked.wanted <= 0:
            return None
        # What the steps up to there have left behind in the progress.
        return Progress(asked.wanted, sum(range(asked.wanted + 1)), asked.wanted * SEQUENCES)

    def finish(self) -> bool:
        self.log.append("finish")
        return self.last_save_is_safe

    def trainer(self, *callbacks: Callback) -> Trainer:
        return Trainer(
            self,  # type: ignore[arg-type]
            self,
            ConstantConfig().build(LR, self.total, lambda duration: self.warmup),
            Boundaries(self.total, self.evaluate_every, self.save_every),
            progress=Progress(self.first, 100.0 if self.first else 0.0, {"train": self.first * SEQUENCES}),
            control=self,  # type: ignore[arg-type]
            evaluate=self.evaluate,
            save=self.save,
            finish=self.finish,
            policy=Policy(self.bad_steps),
            roll_back=self.roll_back,
            callbacks=[Logging(self), *callbacks],
            drawn=lambda step: {"train": step * SEQUENCES},
            on_event=lambda event, **fields: self.log.append(f"{event} at {fields['step']}: {fields['cause']}"),
        )

    def events(self) -> list[str]:
        """What happened, without the steps and the reading of their numbers."""
        return [line for line in self.log if not line.startswith(("step", "read", "callback"))]


class Logging(Callback):
    """Notes what callbacks are called with."""

    order = 1

    def __init__(self, world: World) -> None:
        self.world = world
        self.log = world.log

    def on_start(self, progress: Progress) -> None:
        self.log.append(f"callback start at {progress.step}")

    def on_step(self, step: Step, progress: Progress) -> None:
        evaluated = " evaluated" if step.evaluation else ""
        self.log.append(f"callback {step.number}{evaluated}")
        taken = self.world.rates[step.number - self.world.first - 1]
        assert (step.number, step.lr, step.data_wait_s) == (progress.step, taken, 0.25)

    def on_end(self, outcome: Outcome, progress: Progress) -> None:
        self.log.append(f"callback end {outcome.value} at {progress.step}")


def test_numbers_are_read_one_step_later_and_at_once_at_a_boundary() -> None:
    world = World(total=5, evaluate_every=2, save_every=4)
    assert world.trainer().fit() is Outcome.FINISHED
    assert world.log == [
        "callback start at 0",
        "step 1",
        *("step 2", "read 1", "callback 1", "read 2", "evaluation phase at 2", "evaluate", "callback 2 evaluated"),
        "step 3",
        *("step 4", "read 3", "callback 3", "read 4", "evaluation phase at 4", "evaluate", "callback 4 evaluated"),
        *("save phase at 4", "save 4"),
        *("step 5", "read 5", "evaluation phase at 5", "evaluate", "callback 5 evaluated"),
        *("save phase at 5", "save 5"),
        *("stopping phase at 5", "finish", "callback end finished at 5"),
    ]


@pytest.mark.parametrize("total", [1, 2, 7])
def test_the_last_step_is_evaluated_and_saved_whatever_the_intervals(total: int) -> None:
    world = World(total=total, evaluate_every=1000, save_every=1000)
    assert world.trainer().fit() is Outcome.FINISHED
    assert world.log.count("evaluate") == 1
    assert world.log[-6:] == [
        *(f"callback {total} evaluated", f"save phase at {total}", f"save {total}"),
        *(f"stopping phase at {total}", "finish", f"callback end finished at {total}"),
    ]


def test_no_evaluation_without_held_out_data_and_a_save_by_the_clock_alone_still_ends_with_one() -> None:
    world = World()
    world.trainer().fit()
    assert world.events() == ["save phase at 6", "save 6", "stopping phase at 6", "finish"]


def test_a_vote_to_stop_saves_the_step_at_which_all_ranks_know_of_it() -> None:
    world = World(votes={3: 2 * VOTE_STOP})
    assert world.trainer().fit() is Outcome.STOPPED
    steps = [line for line in world.log if line.startswith("step")]
    # The votes of step 3 are read while step 4 is under way: that one is finished, saved and the last.
    assert steps[-1] == "step 4"
    assert world.log[-5:] == ["save phase at 4", "save 4", "stopping phase at 4", "finish", "callback end stopped at 4"]


def test_a_vote_to_save_saves_once_and_goes_on() -> None:
    world = World(votes={2: VOTE_SAVE})
    assert world.trainer().fit() is Outcome.FINISHED
    assert [line for line in world.log if line.startswith("save ") and "phase" not in line] == ["save 3", "save 6"]


def test_votes_of_many_ranks_for_both_are_counted_separately() -> None:
    ranks = 4096
    world = World(votes={2: ranks * VOTE_SAVE + VOTE_STOP})
    assert world.trainer().fit() is Outcome.STOPPED
    assert [line for line in world.log if line.startswith("save ") and "phase" not in line] == ["save 3"]
    only_saves = World(votes={2: ranks * VOTE_SAVE})
    assert only_saves.trainer().fit() is Outcome.FINISHED


def test_votes_of_the_step_of_a_boundary_are_heard_there() -> None:
    world = World(save_every=3, votes={3: VOTE_STOP})
    assert world.trainer().fit() is Outcome.STOPPED
    assert world.log[-1] == "callback end stopped at 3"
    assert world.log.count("save 3") == 1


def test_a_vote_to_stop_in_the_last_step_is_a_finished_run() -> None:
    world = World(total=4, votes={4: VOTE_STOP})
    assert world.trainer().fit() is Outcome.FINISHED


def test_a_save_that_says_so_ends_the_run() -> None:
    world = World(save_every=2, saves_succeed=False)
    assert world.trainer().fit() is Outcome.STOPPED
    assert world.log[-1] == "callback end stopped at 2"


def test_a_last_save_that_failed_is_an_error_and_not_an_end() -> None:
    world = World(last_save_is_safe=False)
    with pytest.raises(UnsavedError, match="step 6"):
        world.trainer().fit()
    assert "finish" in world.log
    assert not [line for line in world.log if line.startswith("callback end")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_counted_and_the_run_goes_on(value: float) -> None:
    world = World(save_every=4, losses={2: value, 4: value})
    trainer = world.trainer()
    assert trainer.fit() is Outcome.FINISHED
    progress = trainer.progress
    assert (progress.step, progress.tokens, progress.bad_steps.skipped) == (6, 21, 2)
    assert progress.interval_loss == 10 + 30 + 50 + 60
    assert from_plain(json.loads(json.dumps(as_plain(progress)))) == progress


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_too_many_in_a_row_end_the_run_and_say_what_to_do(value: float) -> None:
    world = World(total=9, save_every=4, losses={2: value, 4: value, 5: value})
    with pytest.raises(BadStepsError, match=r"2 steps in a row.*step 5.*optimizer.lr"):
        world.trainer().fit()
    assert "callback 5" not in world.log


def test_a_roll_back_leaves_out_the_batches_that_led_to_it() -> None:
    config = BadStepsConfig(limit=2, rewind=3, skip=5)
    world = World(total=9, losses={6: math.inf, 7: math.inf}, bad_steps=config)
    taken: list[int] = []
    batches = world.batches

    def watched(first_step: int) -> Iterator[StepBatch]:
        for batch in batches(first_step):
            taken.append(batch.step)
            if batch.step > 7:
                world.losses.clear()
            yield batch

    world.batches = watched  # type: ignore[method-assign]
    trainer = world.trainer()
    assert trainer.fit() is Outcome.FINISHED
    assert "roll back from 7 to 4" in world.log
    # Batches 0 to 6 led to step 7, batch 7 was under way, and five more are skipped: step 5 takes batch 12.
    assert taken == [*range(8), *range(12, 17)]
    record = trainer.progress.bad_steps
    assert (record.left_out, record.roll_backs) == (7 + 5 - 4, 1)
    assert trainer.progress.drawn == {"train": (9 + record.left_out) * SEQUENCES}
    assert trainer.progress.tokens == sum(range(10))


def test_no_more_roll_backs_than_allowed_and_none_without_a_checkpoint() -> None:
    losses = {6: math.nan, 7: math.nan}
    endless = World(total=9, losses=losses, bad_steps=BadStepsConfig(limit=2, rewind=3, skip=0, max_roll_backs=2))
    with pytest.raises(BadStepsError, match="already rolled back 2 times"):
        endless.trainer().fit()
    assert [line for line in endless.log if line.startswith("roll")] == ["roll back from 7 to 4"] * 2
    with pytest.raises(BadStepsError, match="no checkpoint before that step"):
        World(total=9, losses=losses, bad_steps=BadStepsConfig(limit=2, rewind=100)).trainer().fit()


def test_a_loss_far_above_those_before_it_is_a_spike_and_is_detected_only_on_request() -> None:
    losses = {number: number * (2.0 + 0.1 * (number % 2)) for number in range(1, 20)}
    spiked = {**losses, 12: 12 * 2.5}
    assert World(total=14, losses=spiked).trainer().fit() is Outcome.FINISHED
    config = BadStepsConfig(spike=5.0, window=8, rewind=2, skip=0, max_roll_backs=0)
    with pytest.raises(
        BadStepsError, match=r"the loss of step 12 is 2.5, but the 8 steps before it had a mean of 2.05"
    ):
        World(total=14, losses=spiked, bad_steps=config).trainer().fit()
    assert World(total=14, losses={**losses, 6: 60.0}, bad_steps=config).trainer().fit() is Outcome.FINISHED


def test_a_loader_that_fails_shows_its_own_error() -> None:
    world = World(loader_fails_at=3)
    with pytest.raises(OSError, match="the disk is gone"):
        world.trainer().fit()
    assert "finish" not in world.log


def test_a_loader_that_ends_early_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended at step 2 of 6"):
        World(loader_ends_at=3).trainer().fit()


@pytest.mark.parametrize("first", [0, 1])
def test_a_step_is_taken_with_the_rate_of_its_own_number(first: int) -> None:
    world = World(total=5, warmup=4, first=first)
    world.trainer().fit()
    assert world.rates == [LR / 4, LR / 2, 3 * LR / 4, LR, LR][first:]


def test_a_run_that_is_at_its_end_takes_no_step() -> None:
    world = World(first=6)
    assert world.trainer().fit() is Outcome.FINISHED
    assert not [line for line in world.log if line.startswith(("step", "save 6"))]


def test_steps_tokens_and_sequences_are_counted_on_from_where_a_run_resumed() -> None:
    world = World(first=2)
    trainer = world.trainer()
    trainer.fit()
    progress = trainer.progress
    assert (progress.step, progress.tokens, progress.drawn) == (6, 100.0 + 3 + 4 + 5 + 6, {"train": 6 * SEQUENCES})
    assert from_plain(json.loads(json.dumps(as_plain(trainer.progress)))) == trainer.progress
    assert "step 2" not in world.log
    assert "step 3" in world.log


def test_the_progress_that_is_saved_is_that_of_the_step() -> None:
    world = World(save_every=2)
    seen: list[tuple[int, float, int]] = []

    def save(progress: Progress) -> bool:
        seen.append((progress.step, progress.tokens, progress.drawn["train"]))
        return True

    trainer = world.trainer()
    trainer.save = save
    trainer.fit()
    assert seen == [(2, 3, 8), (4, 10, 16), (6, 21, 24)]


def test_a_logged_row_sums_over_its_interval(tmp_path: Path) -> None:
    """Every second step is logged, and the one with an evaluation; a mean is over tokens, not over steps."""
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    tracked: list[dict[str, Any]] = []
    log = MetricsLog(
        directory, every=2, mfu=lambda rate: rate, mfu_causal=lambda rate: None, memory_bytes=lambda: 7,
        tracker=tracked.append, units={"tokens": "images", "loss": ""},
    )  # fmt: skip
    losses = {number: float(number * number) for number in range(1, 8)}
    World(total=7, evaluate_every=5, losses=losses).trainer(log).fit()
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert rows == tracked
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 7]
    assert [row["tokens"] for row in rows] == [3, 10, 15, 21, 28]
    assert [row["loss"] for row in rows] == pytest.approx([5 / 3, 25 / 7, 5, 6, 7])
    assert [row["data_wait_s"] for row in rows] == [0.5, 0.5, 0.25, 0.25, 0.25]
    assert [row.get("val_loss") for row in rows] == [None, None, 3.0, None, 3.0]
    assert all((row["lr"], row["mfu_causal"], row["memory_bytes"]) == (LR, None, 7) for row in rows)
    # Steps per second: those of the weights per second, over the weight of a step of the interval.
    for row, weight in zip(rows, (1.5, 3.5, 5, 6, 7), strict=True):
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] / weight, rel=1e-3)
    assert read_units(directory.metrics) == {"tokens": "images", "loss": ""}


def test_a_resumed_log_is_cut_back_to_where_the_run_resumes_and_a_tracker_gets_what_a_kill_may_have_cost_it(
    tmp_path: Path,
) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    tracked: list[dict[str, Any]] = []

    def log() -> MetricsLog:
        return MetricsLog(
            directory, every=1, mfu=lambda _: None, mfu_causal=lambda _: None, memory_bytes=lambda: 0,
            tracker=tracked.append,
        )  # fmt: skip

    World(total=5).trainer(log()).fit()
    tracked.clear()
    World(total=6, first=3).trainer(log()).fit()
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert tracked == rows


def test_a_resume_between_two_logged_steps_changes_no_row(tmp_path: Path) -> None:
    losses = {number: float(number * number) for number in range(1, 9)}

    def run(name: str, *totals: int) -> list[float]:
        directory = RunDirectory(tmp_path / name)
        directory.path.mkdir()
        progress = Progress()
        for total in totals:
            log = MetricsLog(directory, every=4, mfu=lambda _: None, mfu_causal=lambda _: None, memory_bytes=lambda: 0)
            trainer = World(total=total, losses=losses, first=progress.step).trainer(log)
            trainer.progress = progress
            trainer.fit()
            progress = from_plain(json.loads(json.dumps(as_plain(trainer.progress))))
        return [json.loads(line)["loss"] for line in directory.metrics.read_text().splitlines()]

    assert run("resumed", 3, 6, 8) == run("undisturbed", 8) == pytest.approx([30 / 10, 174 / 26])


class Voting(Callback):
    """Votes after given steps."""

    def __init__(self, save: int = 0, stop: int = 0) -> None:
        self.save, self.stop = save, stop

    def on_step(self, step: Step, progress: Progress) -> None:
        if step.number == self.save:
            self.vote_to_save()
        if step.number == self.stop:
            self.vote_to_stop("enough")


def test_a_callbacks_votes_save_once_and_end_the_run_as_finished() -> None:
    world = World(total=20)
    assert world.trainer(Voting(save=3, stop=9)).fit() is Outcome.FINISHED
    saves = [line for line in world.log if line.startswith("save ") and "phase" not in line]
    # Step 4 is under way when step 3 is seen: step 5 carries the vote, and is read when step 6 is under way.
    assert saves == ["save 6", "save 12"]
    assert "ended_early at 12: enough" in world.log


def test_a_stop_of_the_agent_outranks_a_callbacks_end() -> None:
    world = World(total=20, votes={11: VOTE_STOP})
    assert world.trainer(Voting(stop=9)).fit() is Outcome.STOPPED


def early_stop(**keys: Any) -> Callback:
    config = CALLBACKS["early_stop"].model_validate({"name": "early_stop", **keys})
    callback = config.build(None)  # type: ignore[arg-type]
    callback.key = "0 early_stop"
    return callback


def test_early_stop_waits_for_its_patience_and_a_resume_remembers_it() -> None:
    losses = [3.0, 2.0, 2.5, 1.995, 1.0]
    whole = World(total=40, evaluate_every=2, held_out=[*losses])
    whole.trainer(early_stop(patience=2, min_delta=0.01)).fit()
    [ended] = [line for line in whole.log if line.startswith("ended_early")]
    assert "has not improved on 2 at step 4 in 2 evaluations" in ended
    resumed = World(total=6, evaluate_every=2, held_out=losses[:3])
    trainer = resumed.trainer(early_stop(patience=2, min_delta=0.01))
    trainer.fit()
    progress = from_plain(json.loads(json.dumps(as_plain(trainer.progress))))
    later = World(total=40, evaluate_every=2, first=6, held_out=losses[3:])
    trainer = later.trainer(early_stop(patience=2, min_delta=0.01))
    trainer.progress = progress
    trainer.fit()
    assert ended in later.log


def test_early_stop_prefers_the_larger_if_configured_and_never_a_missing_value() -> None:
    world = World(total=12, evaluate_every=2, held_out=[0.1, 0.2, None, 0.3, 0.25, 0.4])
    world.trainer(early_stop(mode="max", patience=2)).fit()
    assert not [line for line in world.log if line.startswith("ended_early")]
    with pytest.raises(UserError, match=r"'val_accuracy'"):
        World(evaluate_every=2).trainer(early_stop(metric="val_accuracy")).fit()


@pytest.mark.parametrize(("keep", "saved"), [(1, [2, 4, 10]), (2, [2, 4, 8, 10])])
def test_steps_whose_evaluation_is_among_the_best_are_saved_also_after_a_resume(keep: int, saved: list[int]) -> None:
    losses = [3.0, 2.0, None, 2.5, 1.5, 4.0]
    rule = BestConfig(keep=keep)
    whole = World(total=13, evaluate_every=2, held_out=[*losses])
    whole.trainer(KeepBest(rule)).fit()
    assert [line for line in whole.log if re.fullmatch(r"save \d+", line)] == [f"save {step}" for step in (*saved, 13)]
    first = World(total=4, evaluate_every=2, held_out=losses[:2])
    trainer = first.trainer(KeepBest(rule))
    trainer.fit()
    record = as_plain(trainer.progress)["callbacks"]["best"]
    assert (record["metric"], record["value"]) == ("val_loss", 2.0)
    later = World(total=13, evaluate_every=2, first=4, held_out=losses[2:])
    resumed = later.trainer(KeepBest(rule))
    resumed.progress = from_plain(json.loads(json.dumps(as_plain(trainer.progress))))
    resumed.fit()
    again = [line for line in [*first.log, *later.log] if re.fullmatch(r"save \d+", line)]
    assert again == [f"save {step}" for step in (*saved, 13)]


def test_device_metrics_travel_with_the_next_step() -> None:
    world, seen = World(total=5), []

    class Watching(Callback):
        order = 90

        def on_step(self, step: Step, progress: Progress) -> None:
            power = world.reducer.recorder.get("device_power")
            seen.append(None if power is None else float(power[0]))

    readings = iter([300.0])
    device = DeviceMetrics(lambda: {"device_power": next(readings)}, every_s=1000)
    world.trainer(device, Watching()).fit()
    assert seen == [300.0] * 5, "the newest reading replaces what no step has taken yet"
    assert world.reducer.recorder.metrics["device_power"].unit == "W"


def test_a_step_without_a_token_is_counted_as_skipped_and_never_as_a_spike() -> None:
    world = World(total=4, losses={2: 0.0})
    train_step = world.train_step

    def without_tokens(step: int, *arguments: Any) -> Result:
        result = train_step(step, *arguments)
        if step == 1:
            return Result(replace(result.numbers, weight=0.0, skipped=1.0), result.note)
        return result

    world.train_step = without_tokens  # type: ignore[method-assign]
    trainer = world.trainer()
    assert trainer.fit() is Outcome.FINISHED
    assert (trainer.progress.tokens, trainer.progress.bad_steps.skipped) == (1 + 3 + 4, 1)
    config = BadStepsConfig(limit=1, then="stop", spike=2.0, window=2)
    world = World(total=4, bad_steps=config)
    train_step = world.train_step
    world.train_step = without_tokens  # type: ignore[method-assign]
    with pytest.raises(BadStepsError, match="no sample with a weight"):
        world.trainer().fit()
