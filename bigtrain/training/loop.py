"""The training loop.

    for batch in loader:                       # data/: which samples, a pure function of the step
        result = engine.train_step(batch, lr)  # engines/: forward, backward, reduce, clip, update
        finish the step before this one        # read its numbers: loss, norm, votes; bad_steps: go back?
        at a boundary (evaluation, save, end):
            finish this step too
            evaluate                           # evaluation.py
        log                                    # callbacks: metrics.jsonl, samples.jsonl, trackers
        save                                   # checkpoint/
        stop where a rank has voted for it

The loop knows no model, no mesh and no engine by name. A step's numbers are read while the next step runs, so that the
device never waits for the host.
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
"""Weight of a vote to save: above any number of ranks, so that one sum carries all kinds of votes."""
VOTE_END = 1.0 / (1 << 20)
"""Weight of a callback's vote to end the run as finished: all of them together are less than one vote to stop."""


class Outcome(enum.Enum):
    """How the loop ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


class UnsavedError(RuntimeError):
    """The run has ended and its last state is not on the disk."""


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


class BatchLoader(Protocol):
    """Yields the batches of consecutive steps."""

    @property
    def data_wait_s(self) -> float:
        """How long the last batch was waited for, in seconds."""
        ...

    def batches(self, first_step: int) -> Iterator[StepBatch]:
        """The batches from `first_step` on."""
        ...


class LoopControl(Protocol):
    """How the loop reports its place to the agent, and receives the agent's requests."""

    def beat(self, step: int, phase: Phase) -> None:
        """Report that this rank is alive, and in which phase of which step."""
        ...

    def vote(self) -> float:
        """VOTE_STOP, VOTE_SAVE, their sum, or 0."""
        ...


class Trainer:
    """The loop; see the module's docstring."""

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
        drawn: Sequences that so many steps have consumed of each source.
        sources: Names of the sources whose losses the engine reports separately.
        save: Saves the state at `progress`; False where the run must end because it cannot be saved.
        finish: Waits for saves under way; False where the last one failed.
        policy: For bad steps.
        on_event: Writes `ended_early`, with step and cause, where a callback ends the run.
        roll_back: Restores an older checkpoint, and returns where it stands; None where there is none.
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
        """Train to the end, or to the step at which the ranks agree to stop."""
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
        """Steps to the end, or to a bad one."""
        skipped_batches = self.progress.bad_steps.left_out
        pending: _Launched | None = None
        self._mark = time.perf_counter()
        for batch in self._batches(self.progress.step, skipped_batches):
            done = batch.step - skipped_batches + 1
            lr = self.schedule.lr(done - 1)
            result = self.engine.train_step(done - 1, batch.micro_batches, lr, self._vote())
            self.control.beat(done, "step")
            if pending is not None and (request := self._finish(pending)) is not None:
                # The step after the bad one is under way: what the ranks voted in it still counts.
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
        """Save where it is due or voted for; how the run ends, where it does."""
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
        """What this rank votes for, the agent's requests and the callbacks' together; each vote is cast once."""
        vote = self.control.vote()
        if any(callback.wants_save for callback in self.callbacks) and vote < VOTE_SAVE:
            vote += VOTE_SAVE
        if any(callback.stop_cause is not None for callback in self.callbacks):
            vote += VOTE_END
        for callback in self.callbacks:
            callback.wants_save = False
        return vote

    def _batches(self, done: int, skipped_batches: int) -> Iterator[StepBatch]:
        """The batches of the steps after `done`; the heartbeat shows a rank that waits for one."""
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
            raise BadStepsError(f"{request.cause}, and there is no checkpoint before it to go back to")
        restored.bad_steps = self.policy.after(before, request, restored.bad_steps, restored.step)
        self.progress = restored
        self._restore_callbacks()
        self._call(lambda callback: callback.on_roll_back(restored))

    def _lap(self) -> float:
        """Seconds since the last call. A step that waits for the one before it lasts as long as that on the device."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _finish(self, launched: _Launched, boundary: bool = False, evaluates: bool = False) -> RollBack | None:
        """Read a step's numbers, move the progress on, and call the callbacks.

        At a boundary no step runs meanwhile: waiting for the device belongs to this one.

        Returns:
            The roll-back that the policy for bad steps requests, if any; nothing else has happened then.
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
        """Add a step's numbers to the progress; a step that was skipped adds no losses and metrics."""
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
        """Let each callback see an event; what it records travels with the next step."""
        with self.engine.reducer.recorder.active(of_ranks=True):
            for callback in self.callbacks:
                event(callback)

    def _restore_callbacks(self) -> None:
        for callback in self.callbacks:
            if callback.key in self.progress.callbacks:
                callback.load_state(self.progress.callbacks[callback.key])
