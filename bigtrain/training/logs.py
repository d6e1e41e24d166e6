"""The callbacks that write the record of a run: metrics, consumed samples, events."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from bigtrain import storage
from bigtrain.run import RunDirectory
from bigtrain.tracking.config import PICTURE_KEY
from bigtrain.tracking.forecast import Watch, band_at, watch_rows
from bigtrain.tracking.metrics import MetricsFile, step_rows
from bigtrain.tracking.numbers import finite
from bigtrain.training.callback import Callback, Step
from bigtrain.training.progress import Progress

Utilisation = Callable[[float], float | None]
"""Returns the MFU at a number of steps per second; None if the device's peak is not known."""


class SampleLog(Callback):
    """Writes samples.jsonl: the samples that each step consumed, in global order."""

    order = 10

    def __init__(self, directory: RunDirectory) -> None:
        self._log = storage.LineLog(directory.samples)

    def on_start(self, progress: Progress) -> None:
        """Remove the lines of steps that the resumed run will run again."""
        self.on_roll_back(progress)

    def on_roll_back(self, progress: Progress) -> None:
        """Remove the lines of the steps that the roll-back undoes."""
        storage.cut_lines(
            self._log.path, keep=lambda line: not isinstance(line.get("step"), int) or line["step"] <= progress.step
        )

    def on_step(self, step: Step, progress: Progress) -> None:
        """Append the step's samples."""
        self._log.append({"step": step.number, "ids": step.batch.sample_ids})


TRACKED_AGAIN: Final = 1000
"""Number of rows that the tracker receives again at a resume: more than a kill can lose at 100 rows per second."""


class MetricsLog(Callback):
    """Writes metrics.jsonl, one object per logged step, and passes the same objects to the tracker."""

    order = 20

    def __init__(
        self,
        directory: RunDirectory,
        *,
        every: int,
        mfu: Utilisation,
        mfu_causal: Utilisation,
        memory_bytes: Callable[[], int],
        tracker: Callable[[dict[str, Any]], None] | None = None,
        epochs: Callable[[int], dict[str, float]] | None = None,
        units: Mapping[str, str] | None = None,
        forecast: dict[str, Any] | None = None,
        event: Callable[..., None] | None = None,
    ) -> None:
        """Args:
        every: Number of steps between logged objects.
        mfu, mfu_causal: Return the MFU at a number of steps per second. `mfu` counts attention in full, `mfu_causal`
            only its causal half.
        memory_bytes: Returns the largest peak memory of all ranks, as of the last time that the ranks compared it.
        tracker: Receives each object as well.
        forecast: The forecast with which the run is compared.
        event: Writes the event `left_forecast` when the run leaves its forecast.
        epochs: Returns the number of epochs of each source of a mixture after a number of global batches.
        units: Units of metrics that depend on the model (`ModelConfig.metric_units`).
        """
        self._file = MetricsFile(directory.metrics)
        self._every = every
        self._mfu, self._mfu_causal = mfu, mfu_causal
        self._memory_bytes = memory_bytes
        self._tracker = tracker
        self._epochs = epochs or (lambda step: {})
        self._units = dict(units or {})
        self._watch = Watch(forecast) if forecast is not None else None
        self._event = event
        self._reset()

    def on_start(self, progress: Progress) -> None:
        """Remove the rows that the resumed run will log again, and send the last remaining rows to the tracker again.

        The tracker writes with a delay, so a kill may have lost these rows.
        """
        self._file.cut(progress.step)
        self._watch_again()
        if self._tracker is not None:
            for row in deque(step_rows(self._file.path), maxlen=TRACKED_AGAIN):
                self._tracker(row)

    def on_roll_back(self, progress: Progress) -> None:
        """Remove the rows of the steps that the roll-back undoes; the tracker keeps them."""
        self._file.cut(progress.step)
        self._watch_again()
        self._reset()

    def on_step(self, step: Step, progress: Progress) -> None:
        """Add the step to the interval, and log the interval if it ends with this step."""
        self._steps += 1
        self._weight += step.weight
        self._seconds += step.seconds
        self._data_wait_s += step.data_wait_s
        if step.number % self._every and not step.evaluation:
            return
        seconds = max(self._seconds, 1e-9)
        row = {
            "step": step.number,
            "tokens": int(progress.tokens),
            # None where all steps since the last object were skipped.
            "loss": progress.interval_loss / progress.interval_weight if progress.interval_weight else None,
            "lr": step.lr,
            "grad_norm": step.gradient_norm,
            "tokens_per_s": round(self._weight / seconds, 1),
            "mfu": self._mfu(self._steps / seconds),
            "mfu_causal": self._mfu_causal(self._steps / seconds),
            "memory_bytes": self._memory_bytes(),
            "data_wait_s": round(self._data_wait_s, 6),
            "skipped_steps": progress.bad_steps.skipped,
            **({} if step.loss_scale is None else {"loss_scale": step.loss_scale}),
            **{name: value.result for name, value in progress.interval_metrics.items() if value.weight},
            **self._of_sources(step, progress),
            **step.evaluation,
            **self._forecast(progress.tokens),
        }
        self._file.append(row)
        self._hold(row)
        units = {name: value.metric.unit for name, value in progress.interval_metrics.items() if value.metric.unit}
        self._file.add_units({**self._units, **units, **step.units})
        if self._tracker is not None:
            self._tracker(
                {**row, **{f"pictures/{title}": {PICTURE_KEY: place} for title, place in step.pictures.items()}}
            )
        progress.end_interval()
        self._reset()

    def _of_sources(self, step: Step, progress: Progress) -> dict[str, float]:
        """The number of epochs of each source of a mixture, and how many of the source's tokens have counted."""
        epochs = self._epochs(step.batch.step + 1)
        tokens = progress.source_tokens or {}
        return {
            **{f"epochs/{name}": round(count, 6) for name, count in epochs.items()},
            **{f"tokens/{name}": int(count) for name, count in tokens.items()},
        }

    def _forecast(self, tokens: float) -> dict[str, float]:
        """The forecast's loss and band at a number of tokens, which the tracker plots beside the run's loss."""
        band = band_at(self._watch.forecast, tokens) if self._watch is not None else None
        return {f"forecast/{name}": value for name, value in (band or {}).items()}

    def _watch_again(self) -> None:
        """Rebuild the comparison with the forecast from the logged rows; what these show was reported before."""
        if self._watch is not None:
            self._watch = watch_rows(self._watch.forecast, step_rows(self._file.path))

    def _hold(self, row: dict[str, Any]) -> None:
        if self._watch is not None and self._event is not None:
            loss, val_loss, lr = (finite(row.get(name)) for name in ("loss", "val_loss", "lr"))
            left = self._watch.add(row["step"], row["tokens"], loss, val_loss, lr)
            if left is not None:
                self._event("left_forecast", **left)

    def _reset(self) -> None:
        self._steps = 0
        self._weight = self._seconds = self._data_wait_s = 0.0


class Announcements(Callback):
    """Writes the start and the skipped steps of this attempt to events.jsonl. The controller writes the run's end."""

    order = 5

    def __init__(self, event: Callable[..., None], total_steps: int, how: dict[str, Any]) -> None:
        """Args:
        how: Fields of the start event that describe engine, mesh and nodes.
        """
        self._event = event
        self._total_steps = total_steps
        self._how = how

    def on_start(self, progress: Progress) -> None:
        """Write `started` at step 0, and `resumed` at later steps."""
        name = "resumed" if progress.step else "started"
        self._event(name, step=progress.step, total_steps=self._total_steps, **self._how)

    def on_step(self, step: Step, progress: Progress) -> None:
        """Write `skipped` if the step updated nothing."""
        if step.skipped:
            cause = "loss or gradient are not finite" if step.weight else "nothing in the batch has a weight"
            if step.weight and step.loss_scale is not None:
                cause += f" at a loss scale of {step.loss_scale:g}"
            self._event("skipped", step=step.number, cause=cause, skipped_steps=progress.bad_steps.skipped)
