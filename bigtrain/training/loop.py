"""The training loop.

    for batch in loader:                       # data/: which samples, a pure function of the step
        result = engine.train_step(batch, lr)  # engines/: forward, backward, reduce, clip, update
        finish the step before this one        # read its numbers: loss, norm, votes
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
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bigtrain.data.loader import StepBatch
from bigtrain.engines.contract import Engine, StepResult
from bigtrain.heartbeat import Phase
from bigtrain.optim.schedule import Schedule
from bigtrain.training.boundaries import Boundaries

VOTE_STOP = 1.0
VOTE_SAVE = float(1 << 20)
"""Weight of a vote to save: above any number of ranks, so that one sum carries both kinds of vote."""


class Outcome(enum.Enum):
    """How the loop ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient of a step is not a number; the state after it is never saved."""


class UnsavedError(RuntimeError):
    """The run has ended and its last state is not on the disk."""


@dataclass
class Progress:
    """How far a run is: with the weights and the optimizer, all that a resume needs."""

    step: int = 0
    """Optimizer steps done."""

    tokens: float = 0.0
    """Sum of the weights of all samples consumed: tokens for text, images for images."""

    drawn: int = 0
    """Sequences drawn from the training data."""

    interval_loss: float = 0.0
    """Sum of the losses since the last logged step, on the rank that logs: a resume may fall between two of them."""

    interval_weight: float = 0.0
    """Sum of the weights since the last logged step."""


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
    evaluation: dict[str, float] = field(default_factory=dict)
    """Held-out metrics, where this step was followed by an evaluation."""


@dataclass(frozen=True)
class _Launched:
    """A step whose numbers have not been read yet."""

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
        callbacks: Sequence[Callback] = (),
        batch_sequences: int,
    ) -> None:
        """Args:
        save: Saves the state at `progress`; False where the run must end because it cannot be saved.
        finish: Waits for saves under way; False where the last one failed.
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
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.batch_sequences = batch_sequences
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
        total = self.boundaries.total_steps
        if self.progress.step >= total:
            return Outcome.FINISHED
        pending: _Launched | None = None
        self._mark = time.perf_counter()
        self.control.beat(self.progress.step, "step")
        for batch in self.loader.batches(self.progress.step):
            lr = self.schedule.lr(batch.step)
            result = self.engine.train_step(batch.step, batch.micro_batches, lr, self.control.vote())
            done = batch.step + 1
            self.control.beat(done, "step")
            if pending is not None:
                self._finish(pending)
            pending = _Launched(batch, lr, result, self.loader.data_wait_s, self._lap())
            evaluates, saves = self.boundaries.evaluates(done), self.boundaries.saves(done)
            if evaluates or saves or self._votes:
                self._finish(pending, boundary=True, evaluates=evaluates)
                pending = None
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

    def _lap(self) -> float:
        """Seconds since the last call. A step that waits for the one before it lasts as long as that on the device."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _finish(self, launched: _Launched, boundary: bool = False, evaluates: bool = False) -> None:
        """Read a step's numbers, move the progress on, and let the callbacks see it.

        At a boundary no step runs meanwhile: waiting for the device belongs to this one.
        """
        numbers = launched.result.read()
        seconds = launched.seconds + (self._lap() if boundary else 0.0)
        done = launched.batch.step + 1
        if not (math.isfinite(numbers.loss) and math.isfinite(numbers.gradient_norm)):
            raise NonFiniteLoss(
                f"step {done}: the loss is {numbers.loss / max(numbers.weight, 1.0):g} and the gradient's norm "
                f"{numbers.gradient_norm:g}. Lower optimizer.lr, lengthen schedule.warmup, or set optimizer.clip."
            )
        self._votes += numbers.votes
        self.progress.step = done
        self.progress.tokens += numbers.weight
        self.progress.interval_loss += numbers.loss
        self.progress.interval_weight += numbers.weight
        self.progress.drawn = done * self.batch_sequences
        step = Step(
            number=done,
            batch=launched.batch,
            lr=launched.lr,
            loss_sum=numbers.loss,
            weight=numbers.weight,
            gradient_norm=numbers.gradient_norm,
            seconds=seconds,
            data_wait_s=launched.data_wait_s,
        )
        if evaluates:
            self.control.beat(done, "evaluation")
            step.evaluation = self.evaluate()
            self.control.beat(done, "step")
        for callback in self.callbacks:
            callback.on_step(step, self.progress)

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
        "drawn": {"train": progress.drawn},
        "interval": {"loss": progress.interval_loss, "weight": progress.interval_weight},
    }


def from_plain(plain: dict[str, Any]) -> Progress:
    """The progress that a checkpoint's manifest holds."""
    interval = plain.get("interval", {"loss": 0.0, "weight": 0.0})
    return Progress(
        step=int(plain["step"]),
        tokens=float(plain["tokens"]),
        drawn=int(plain["drawn"]["train"]),
        interval_loss=float(interval["loss"]),
        interval_weight=float(interval["weight"]),
    )
