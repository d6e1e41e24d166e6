"""The training loop.

    for batch in loader:                       # data/: the step's samples, a pure function of the step
        result = engine.train_step(batch, lr)  # engines/: forward, backward, all-reduce, clip, update
        finish the step before this one        # read its loss, norm and votes; bad_steps: roll back?
        at a boundary (evaluation, save, end):
            finish this step too
            evaluate                           # evaluation.py
        log                                    # callbacks: metrics.jsonl, samples.jsonl, trackers
        save                                   # checkpoint/
        stop if a rank has voted to stop

The loop knows no model, no mesh and no engine by name. It reads the results of a step (`StepNumbers`) while the next
step runs, so that the device never waits for the host.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bigtrain.data.loader import StepBatch
from bigtrain.engines.contract import Engine, StepNumbers, StepResult
from bigtrain.heartbeat import Phase
from bigtrain.metrics import Value, merge
from bigtrain.optim.schedule import Schedule
from bigtrain.training.bad_steps import BadStepsError, Policy, RollBack
from bigtrain.training.boundaries import Boundaries
from bigtrain.training.callback import Callback, Step
from bigtrain.training.evaluation import Evaluated
from bigtrain.training.progress import Progress, source_loss

VOTE_STOP = 1.0
VOTE_SAVE = float(1 << 20)
"""Value of a vote to save. It is larger than any number of ranks, so that one sum over ranks carries all votes."""
VOTE_END = 1.0 / (1 << 20)
"""Value of a callback's vote to end the run as finished. Such votes of all ranks sum up to less than VOTE_STOP."""


class Outcome(enum.Enum):
    """How the loop ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


class UnsavedError(RuntimeError):
    """The run has ended, and its last state could not be saved."""


@dataclass(frozen=True)
class _Launched:
    """A launched step whose results have not been read yet."""

    number: int
    """The step's number, counted from 1."""
    batch: StepBatch
    lr: float
    result: StepResult
    data_wait_s: float
    seconds: float


class BatchLoader(Protocol):
    """Yields the batches of consecutive steps."""

    @property
    def data_wait_s(self) -> float:
        """Seconds that the loop waited for the last batch."""
        ...

    def batches(self, first_step: int) -> Iterator[StepBatch]:
        """Yield the batches of step `first_step` and of all later steps; steps are counted from 0."""
        ...


class LoopControl(Protocol):
    """The interface through which the loop reports its position to the agent and receives the agent's requests."""

    def beat(self, step: int, phase: Phase) -> None:
        """Report that this rank is alive, and which phase of which step it is in."""
        ...

    def vote(self) -> float:
        """This rank's vote, which the next step carries: VOTE_STOP, VOTE_SAVE, their sum, or 0."""
        ...


class Trainer:
    """Runs the training loop; see the module's docstring."""

    def __init__(
        self,
        engine: Engine,
        loader: BatchLoader,
        schedule: Schedule,
        boundaries: Boundaries,
        *,
        progress: Progress,
        control: LoopControl,
        evaluate: Callable[[], Evaluated],
        save: Callable[[Progress], bool],
        finish: Callable[[], bool],
        policy: Policy,
        roll_back: Callable[[RollBack], Progress | None],
        callbacks: Sequence[Callback] = (),
        drawn: Callable[[int], dict[str, int]],
        sources: Sequence[str] = (),
        on_event: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        """Args:
        drawn: Maps a number of global batches to the sequences that they consume from each source.
        sources: Names of the sources whose losses the engine reports separately.
        save: Saves the state at `progress`. Returns False if the run must end because it cannot be saved.
        finish: Waits for saves in progress. Returns False if the last one failed.
        policy: The policy for bad steps.
        on_event: Writes the event `ended_early`, with step and cause, if a callback ends the run.
        roll_back: Restores an older checkpoint and returns its progress; None if there is none.
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
        self._event = on_event
        self._votes = 0.0
        self._mark = 0.0

    def fit(self) -> Outcome:
        """Train to the end, or to the step at which the ranks agree to stop.

        Raises:
            UnsavedError: The last checkpoint could not be saved.
            BadStepsError: The policy for bad steps ends the run, or there is no checkpoint to roll back to.
        """
        self._restore_callbacks()
        self._call(lambda callback: callback.on_start(self.progress))
        outcome = self._steps()
        self.control.beat(self.progress.step, "stopping")
        if not self.finish():
            raise UnsavedError(f"step {self.progress.step}, the last one, could not be saved: see events.jsonl")
        self._call(lambda callback: callback.on_end(outcome, self.progress))
        return outcome

    def _steps(self) -> Outcome:
        if self.progress.step >= self.boundaries.total_steps:
            return Outcome.FINISHED
        while isinstance(outcome := self._segment(), RollBack):
            self._go_back(outcome)
        return outcome

    def _segment(self) -> Outcome | RollBack:
        """Train until the run ends, or until the policy for bad steps requests a roll-back."""
        skipped_batches = self.progress.bad_steps.left_out
        pending: _Launched | None = None
        self._mark = time.perf_counter()
        for batch in self._batches(self.progress.step, skipped_batches):
            done = batch.step - skipped_batches + 1
            lr = self.schedule.lr(done - 1)
            result = self.engine.train_step(done - 1, batch.micro_batches, lr, self._vote())
            self.control.beat(done, "step")
            if pending is not None and (request := self._finish(pending)) is not None:
                # The step after the bad one has already been launched: the votes that it carries still count.
                self._votes += result.read().votes
                return request
            pending = _Launched(done, batch, lr, result, self.loader.data_wait_s, self._lap())
            evaluates, saves = self.boundaries.evaluates(done), self.boundaries.saves(done)
            if evaluates or saves or self._votes:
                request = self._finish(pending, boundary=True, evaluates=evaluates)
                pending = None
                if request is not None:
                    return request
                if (outcome := self._boundary(saves)) is not None:
                    return outcome
        raise RuntimeError(f"the loader ended at step {self.progress.step} of {self.boundaries.total_steps}")

    def _boundary(self, saves: bool) -> Outcome | None:
        """Save if a checkpoint is due or was voted for. Returns how the run ends, or None if it continues."""
        saves = saves or any(callback.saves_evaluated for callback in self.callbacks)
        for callback in self.callbacks:
            callback.saves_evaluated = False
        of_stops = self._votes % VOTE_SAVE
        stops, ends = of_stops >= VOTE_STOP, of_stops % VOTE_STOP > 0
        if saves or self._votes:
            self._votes = 0.0
            stops = not self._save() or stops
        self._lap()
        if self.progress.step >= self.boundaries.total_steps:
            return Outcome.FINISHED
        if stops:
            return Outcome.STOPPED
        if not ends:
            return None
        causes = [callback.stop_cause for callback in self.callbacks if callback.stop_cause]
        self._event("ended_early", step=self.progress.step, cause="; ".join(causes) or "a callback of another rank")
        return Outcome.FINISHED

    def _vote(self) -> float:
        """This rank's vote: the agent's and the callbacks' requests together. A request to save is cast only once."""
        vote = self.control.vote()
        if any(callback.wants_save for callback in self.callbacks) and vote < VOTE_SAVE:
            vote += VOTE_SAVE
        if any(callback.stop_cause is not None for callback in self.callbacks):
            vote += VOTE_END
        for callback in self.callbacks:
            callback.wants_save = False
        return vote

    def _batches(self, done: int, skipped_batches: int) -> Iterator[StepBatch]:
        """Yield the batches of the steps after `done`. While the rank waits for one, its heartbeat phase is "data"."""
        batches = self.loader.batches(done + skipped_batches)
        while True:
            self.control.beat(done, "data")
            batch = next(batches, None)
            self.control.beat(done, "step")
            if batch is None:
                return
            yield batch
            done += 1

    def _go_back(self, request: RollBack) -> None:
        """Restore an older checkpoint, and skip the batches that led to the bad step."""
        self.control.beat(self.progress.step, "start")
        before = self.progress.bad_steps
        restored = self.roll_back(request)
        if restored is None:
            raise BadStepsError(f"{request.cause}, and there is no checkpoint before that step to roll back to")
        restored.bad_steps = self.policy.after(before, request, restored.bad_steps, restored.step)
        self.progress = restored
        self._restore_callbacks()
        self._call(lambda callback: callback.on_roll_back(restored))

    def _lap(self) -> float:
        """Seconds since the last call.

        The host waits in each step for the step before it, so in the steady state this is the duration of a step on
        the device.
        """
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _finish(self, launched: _Launched, boundary: bool = False, evaluates: bool = False) -> RollBack | None:
        """Read a step's results, advance the progress, and call the callbacks.

        At a boundary no other step runs, so the time spent waiting for the device counts towards this step.

        Returns:
            The roll-back that the policy for bad steps requests, or None. If there is one, the progress does not
            advance, and no callback is called.
        """
        numbers = launched.result.read()
        seconds = launched.seconds + (self._lap() if boundary else 0.0)
        if numbers.unknown:
            self.engine.reducer.agree()
        self._votes += numbers.votes
        request = self.policy.judge(self.progress.bad_steps, launched.number, numbers)
        if request is not None:
            return request
        self._advance(launched.number, numbers)
        step = Step(
            number=launched.number,
            batch=launched.batch,
            lr=launched.lr,
            loss_sum=numbers.loss,
            weight=numbers.weight,
            gradient_norm=numbers.gradient_norm,
            seconds=seconds,
            data_wait_s=launched.data_wait_s,
            skipped=bool(numbers.skipped),
            loss_scale=numbers.loss_scale,
            metrics=numbers.metrics,
        )
        if evaluates:
            self.control.beat(step.number, "evaluation")
            evaluated = self.evaluate()
            step.evaluation, step.units = evaluated.values, evaluated.units
            self.control.beat(step.number, "step")
        self._call(lambda callback: callback.on_step(step, self.progress))
        return None

    def _advance(self, done: int, numbers: StepNumbers) -> None:
        """Add a step's results to the progress; a skipped step adds no losses and no metrics."""
        progress = self.progress
        progress.step = done
        progress.tokens += numbers.weight
        progress.drawn = self.drawn(done + progress.bad_steps.left_out)
        sources = list(zip(self.sources, numbers.sources, strict=False))
        if progress.source_tokens is not None:
            for name, (_, weight) in sources:
                progress.source_tokens[name] = progress.source_tokens.get(name, 0.0) + weight
        if numbers.skipped:
            return
        progress.interval_loss += numbers.loss
        progress.interval_weight += numbers.weight
        losses = {(metric := source_loss(name)).name: Value(metric, *sums) for name, sums in sources}
        merge(progress.interval_metrics, {**losses, **numbers.metrics})

    def _save(self) -> bool:
        self.control.beat(self.progress.step, "save")
        states = {callback.key: callback.state() for callback in self.callbacks if callback.key}
        self.progress.callbacks = {key: state for key, state in states.items() if state}
        saved = self.save(self.progress)
        self._call(lambda callback: callback.on_save(self.progress))
        self.control.beat(self.progress.step, "step")
        return saved

    def _call(self, event: Callable[[Callback], None]) -> None:
        """Pass an event to each callback; the next step's all-reduce carries the metrics that callbacks record."""
        with self.engine.reducer.recorder.active(of_ranks=True):
            for callback in self.callbacks:
                event(callback)

    def _restore_callbacks(self) -> None:
        for callback in self.callbacks:
            if callback.key in self.progress.callbacks:
                callback.load_state(self.progress.callbacks[callback.key])
