"""The training loop.

    for batch in loader:                       # data/: which samples, a pure function of the step
        result = engine.train_step(batch, lr)  # engines/: forward, backward, reduce, clip, update
        finish the step before this one        # read its numbers: loss, norm, votes; bad_steps: go back?
        at a boundary (evaluation, save, end):
            finish this step too
            evaluate
        log                                    # callbacks: metrics.jsonl, samples.jsonl, W&B
        save                                   # checkpoint/
        stop where a rank has voted for it

The loop knows no model, no mesh and no engine by name. A step's numbers are read while the next step runs, so that the
device never waits for the host.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bigtrain.data.loader import StepBatch
from bigtrain.engines.contract import Engine, StepResult
from bigtrain.heartbeat import Phase
from bigtrain.optim.schedule import Schedule
from bigtrain.training.bad_steps import BadStepsError, Policy, Record, RollBack
from bigtrain.training.boundaries import Boundaries

VOTE_STOP = 1.0
VOTE_SAVE = float(1 << 20)
"""Weight of a vote to save: above any number of ranks, so that one sum carries both kinds of vote."""


class Outcome(enum.Enum):
    """How the loop ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


class UnsavedError(RuntimeError):
    """The run has ended and its last state is not on the disk."""


@dataclass
class Progress:
    """How far a run is: with the weights and the optimizer, all that a resume needs."""

    step: int = 0
    """Optimizer steps done."""

    tokens: float = 0.0
    """Sum of the weights of all samples consumed: tokens for text, images for images."""

    drawn: dict[str, int] = field(default_factory=dict)
    """Sequences drawn from each source of the training data."""

    interval_loss: float = 0.0
    """Sum of the losses since the last logged step, on the rank that logs: a resume may fall between two of them."""

    interval_weight: float = 0.0
    """Sum of the weights since the last logged step, without those of steps that were skipped."""

    bad_steps: Record = field(default_factory=Record)
    """What the policy for bad steps remembers."""

    interval_sources: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The same two sums of each source of a mixture."""


@dataclass
class Step:
    """One finished step, as callbacks see it."""

    number: int
    """Steps done, this one included."""

    batch: StepBatch
    lr: float
    loss_sum: float
    weight: float
    gradient_norm: float
    seconds: float
    data_wait_s: float
    skipped: bool = False
    """Whether loss or gradient were not finite, so that nothing was updated."""
    loss_scale: float | None = None
    """FP16's."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Held-out metrics, where this step was followed by an evaluation."""


@dataclass(frozen=True)
class _Launched:
    """A step whose numbers have not been read yet."""

    number: int
    """Steps done when it is."""
    batch: StepBatch
    lr: float
    result: StepResult
    data_wait_s: float
    seconds: float


class Callback:
    """Something that hangs on the loop; callbacks run in the order of `order`, on every rank."""

    order = 50

    def on_start(self, progress: Progress) -> None:
        """Before the first step of this process."""

    def on_step(self, step: Step, progress: Progress) -> None:
        """After each step, in order, none left out."""

    def on_roll_back(self, progress: Progress) -> None:
        """After a roll-back: the steps after `progress.step` will come again, on other batches."""

    def on_end(self, outcome: Outcome, progress: Progress) -> None:
        """After the last step, when everything is saved."""


class Loader(Protocol):
    """Yields the batches of consecutive steps."""

    @property
    def data_wait_s(self) -> float:
        """How long the last batch was waited for, in seconds."""
        ...

    def batches(self, first_step: int) -> Iterator[StepBatch]:
        """The batches from `first_step` on."""
        ...


class Control(Protocol):
    """How the loop tells its agent where it is, and hears what it should do."""

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this rank lives, and in which phase of which step."""
        ...

    def vote(self) -> float:
        """VOTE_STOP, VOTE_SAVE, their sum, or 0."""
        ...


class Trainer:
    """The loop; see the module's docstring."""

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        schedule: Schedule,
        boundaries: Boundaries,
        *,
        progress: Progress,
        control: Control,
        evaluate: Callable[[], dict[str, float]],
        save: Callable[[Progress], bool],
        finish: Callable[[], bool],
        policy: Policy,
        roll_back: Callable[[RollBack], Progress | None],
        callbacks: Sequence[Callback] = (),
        drawn: Callable[[int], dict[str, int]],
        sources: Sequence[str] = (),
    ) -> None:
        """Args:
        drawn: Sequences that so many steps have drawn from each source.
        sources: The names of those whose losses the engine tells apart.
        save: Saves the state at `progress`; False where the run must end because it cannot be saved.
        finish: Waits for saves under way; False where the last one failed.
        policy: For bad steps.
        roll_back: Brings an older checkpoint back, and returns where it stands; None where there is none.
        """
        self.engine = engine
        self.loader = loader
        self.schedule = schedule
        self.boundaries = boundaries
        self.progress = progress
        self.control = control
        self.evaluate = evaluate
        self.save = save
        self.finish = finish
        self.policy = policy
        self.roll_back = roll_back
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.drawn = drawn
        self.sources = tuple(sources)
        self._votes = 0.0
        self._mark = 0.0

    def fit(self) -> Outcome:
        """Train to the end, or to the step at which the ranks agree to stop."""
        for callback in self.callbacks:
            callback.on_start(self.progress)
        outcome = self._steps()
        self.control.beat(self.progress.step, "stopping")
        if not self.finish():
            raise UnsavedError(f"step {self.progress.step}, the last one, could not be saved: see events.jsonl")
        for callback in self.callbacks:
            callback.on_end(outcome, self.progress)
        return outcome

    def _steps(self) -> Outcome:
        if self.progress.step >= self.boundaries.total_steps:
            return Outcome.FINISHED
        while isinstance(outcome := self._leg(), RollBack):
            self._go_back(outcome)
        return outcome

    def _leg(self) -> Outcome | RollBack:
        """Steps to the end, or to a bad one."""
        total, left_out = self.boundaries.total_steps, self.progress.bad_steps.left_out
        pending: _Launched | None = None
        self._mark = time.perf_counter()
        for batch in self._batches(self.progress.step, left_out):
            done = batch.step - left_out + 1
            lr = self.schedule.lr(done - 1)
            result = self.engine.train_step(done - 1, batch.micro_batches, lr, self.control.vote())
            self.control.beat(done, "step")
            if pending is not None and (asked := self._finish(pending)) is not None:
                # The step after the bad one is under way: what the ranks said in it still counts.
                self._votes += result.read().votes
                return asked
            pending = _Launched(done, batch, lr, result, self.loader.data_wait_s, self._lap())
            evaluates, saves = self.boundaries.evaluates(done), self.boundaries.saves(done)
            if evaluates or saves or self._votes:
                asked = self._finish(pending, boundary=True, evaluates=evaluates)
                pending = None
                if asked is not None:
                    return asked
                stops = self._votes % VOTE_SAVE > 0
                if saves or self._votes:
                    self._votes = 0.0
                    stops = not self._save() or stops
                self._lap()
                if done >= total:
                    return Outcome.FINISHED
                if stops:
                    return Outcome.STOPPED
        raise RuntimeError(f"the loader ended at step {self.progress.step} of {total}")

    def _batches(self, done: int, left_out: int) -> Iterator[StepBatch]:
        """The batches of the steps after `done`; a rank that waits for one shows it."""
        batches = self.loader.batches(done + left_out)
        while True:
            self.control.beat(done, "data")
            batch = next(batches, None)
            self.control.beat(done, "step")
            if batch is None:
                return
            yield batch
            done += 1

    def _go_back(self, asked: RollBack) -> None:
        """Go on from an older checkpoint, past the batches that led to a bad step."""
        self.control.beat(self.progress.step, "start")
        before = self.progress.bad_steps
        restored = self.roll_back(asked)
        if restored is None:
            raise BadStepsError(f"{asked.cause}, and there is no checkpoint before it to go back to")
        restored.bad_steps = self.policy.after(before, asked, restored.bad_steps, restored.step)
        self.progress = restored
        for callback in self.callbacks:
            callback.on_roll_back(restored)

    def _lap(self) -> float:
        """Seconds since the last call. A step that waits for the one before it lasts as long as that on the device."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _finish(self, launched: _Launched, boundary: bool = False, evaluates: bool = False) -> RollBack | None:
        """Read a step's numbers, move the progress on, and let the callbacks see it.

        At a boundary no step runs meanwhile: waiting for the device belongs to this one.

        Returns:
            What the policy for bad steps asks for, if anything; nothing else has happened then.
        """
        numbers = launched.result.read()
        seconds = launched.seconds + (self._lap() if boundary else 0.0)
        done, record = launched.number, self.progress.bad_steps
        self._votes += numbers.votes
        asked = self.policy.judge(record, done, numbers)
        if asked is not None:
            return asked
        self.progress.step = done
        self.progress.tokens += numbers.weight
        if not numbers.skipped:
            self.progress.interval_loss += numbers.loss
            self.progress.interval_weight += numbers.weight
            for name, (loss, weight) in zip(self.sources, numbers.sources, strict=False):
                before = self.progress.interval_sources.get(name, (0.0, 0.0))
                self.progress.interval_sources[name] = before[0] + loss, before[1] + weight
        self.progress.drawn = self.drawn(done + record.left_out)
        step = Step(
            number=done,
            batch=launched.batch,
            lr=launched.lr,
            loss_sum=numbers.loss,
            weight=numbers.weight,
            gradient_norm=numbers.gradient_norm,
            seconds=seconds,
            data_wait_s=launched.data_wait_s,
            skipped=bool(numbers.skipped),
            loss_scale=numbers.loss_scale,
        )
        if evaluates:
            self.control.beat(done, "evaluation")
            step.evaluation = self.evaluate()
            self.control.beat(done, "step")
        for callback in self.callbacks:
            callback.on_step(step, self.progress)
        return None

    def _save(self) -> bool:
        self.control.beat(self.progress.step, "save")
        saved = self.save(self.progress)
        self.control.beat(self.progress.step, "step")
        return saved


def as_plain(progress: Progress) -> dict[str, Any]:
    """The progress as a checkpoint's manifest holds it."""
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "drawn": dict(progress.drawn),
        "interval": {
            "loss": progress.interval_loss,
            "weight": progress.interval_weight,
            "sources": {name: list(sums) for name, sums in progress.interval_sources.items()},
        },
        "bad_steps": progress.bad_steps.as_plain(),
    }


def from_plain(plain: dict[str, Any]) -> Progress:
    """The progress that a checkpoint's manifest holds."""
    interval = plain.get("interval", {"loss": 0.0, "weight": 0.0})
    return Progress(
        step=int(plain["step"]),
        tokens=float(plain["tokens"]),
        drawn={str(name): int(count) for name, count in plain["drawn"].items()},
        interval_loss=float(interval["loss"]),
        interval_weight=float(interval["weight"]),
        bad_steps=Record(**plain.get("bad_steps", {})),
        interval_sources={
            str(name): (float(loss), float(weight)) for name, (loss, weight) in interval.get("sources", {}).items()
        },
    )
