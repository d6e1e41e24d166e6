"""A forecast that is recorded before a run, and its comparison with the run.

    RUN/forecast.json    written by `bigtrain scaling preregister`, before the first step
    RUN/run.json         the forecast's hash under "forecast", from the first start on; not a part of the identity
    RUN/events.jsonl     the hash in the event "forecast"; "left_forecast" when the run leaves the band

The training loss is averaged over BINS equal shares of the run's tokens. The run has left the forecast in one of three
cases, each of which has at most 2 % of sound runs:

- loss: two consecutive averages are outside the band;
- drift: the averages deviate from what the forecast and the earlier averages predict, by a CUSUM (Page 1954) of the
  standardised errors of these predictions. An error of the law in the level is in the first of them and no other, so
  that the course of the loss is compared more precisely than its level;
- val_loss: the held-out loss at the end is outside its 99 % interval.

It has also left if its learning rate is not that of the config for which the forecast was made (lr): if it exceeds the
highest rate of that config, or has not reached it in the first half of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.run import names
from bigtrain.storage import hash_file
from bigtrain.tracking.history import read_events
from bigtrain.tracking.metrics import read_metrics
from bigtrain.tracking.numbers import finite

BINS = 40
"""Number of equal shares of a run's tokens, over each of which the loss is averaged."""
MAX_SPARSE = 2.0
"""Largest number of shares in one logged interval; in a longer interval the course of the loss is unknown."""
SUCCESSION = 2
"""Number of consecutive averages outside the band after which the run has left it."""
SLACK = 0.5
"""Part of each standardised error that a CUSUM ignores; the sum is most sensitive to a shift of twice that."""
DRIFT = 6.2
"""Least CUSUM of a drift: 2 % of series of BINS independent standard normal values reach it."""
SAME_LR = 0.02
"""Largest relative difference of two learning rates that count as the same."""
KIND = "bigtrain forecast"


def read_forecast(run_dir: Path) -> dict[str, Any] | None:
    """Read the forecast of a run; None if there is none or it cannot be parsed."""
    try:
        found = json.loads((run_dir / names.FORECAST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("kind") == KIND else None


def forecast_hash(run_dir: Path) -> str | None:
    """The hash of a run's forecast; None if there is none."""
    path = run_dir / names.FORECAST
    return hash_file(path) if path.exists() else None


def band_of(forecast: Mapping[str, Any], number: int) -> dict[str, float] | None:
    """The forecast's loss, low and high for one share of the tokens, numbered from 0; None if it has none there."""
    middle = (number + 0.5) / BINS
    inside = [one for one in forecast["curve"] if one["from"] < middle < one["to"]]
    names_of = ("loss", "low", "high", "deviation")
    return {name: float(inside[0][name]) for name in names_of if name in inside[0]} if inside else None


def band_at(forecast: Mapping[str, Any], tokens: float) -> dict[str, float] | None:
    """The forecast's loss, low and high after a number of tokens; None if it has none there."""
    share = min(tokens / float(forecast["tokens"]), 1.0)
    inside = [one for one in forecast["curve"] if one["from"] < share <= one["to"] + 1e-9]
    return {name: float(inside[0][name]) for name in ("loss", "low", "high")} if inside else None


def correlation_matrix(correlation: Sequence[float], shares: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The correlation of a run's errors in some shares, a + b r^|i-j|, and 1 for i = j; shape (k, k).

    Args:
        correlation: a, b and r.
        shares: Numbers of the shares, shape (k,).
    """
    a, b, r = correlation
    index = np.asarray(shares)
    gaps = np.abs(index[:, None] - index)
    return np.asarray(a + b * r**gaps + (1 - a - b) * (gaps == 0), dtype=np.float64)


@dataclass
class Drift:
    """The CUSUM of the standardised errors of a run's averages, each predicted from the run's earlier averages."""

    correlation: Sequence[float]
    """a, b and r of `correlation_matrix`."""
    level: float
    """Standard deviation of an error of the law that all averages share."""
    _shares: list[int] = field(default_factory=list)
    _errors: list[float] = field(default_factory=list)
    _deviations: list[float] = field(default_factory=list)
    _sums: tuple[float, float] = (0.0, 0.0)
    _since: list[int] = field(default_factory=lambda: [0, 0])
    """For the upper and the lower sum, the step at which it last left zero."""

    def add(self, step: int, share: int, error: float, deviation: float) -> float:
        """Add the error of one average; returns the larger sum, negative for averages below their predictions.

        Args:
            step: The step that is reported if the drift began here.
            share: Number of the share.
            error: ln measured - ln predicted.
            deviation: Standard deviation of the error apart from the law's.
        """
        self._shares.append(share)
        self._errors.append(error)
        self._deviations.append(deviation)
        scale = np.array(self._deviations)
        covariance = scale[:, None] * scale * correlation_matrix(self.correlation, self._shares) + self.level**2
        lower = np.linalg.cholesky(covariance)
        innovation = float(np.linalg.solve(lower, np.array(self._errors))[-1])
        sums = []
        for number, sign in enumerate((1, -1)):
            if not self._sums[number]:
                self._since[number] = step
            sums.append(max(0.0, self._sums[number] + sign * innovation - SLACK))
        self._sums = (sums[0], sums[1])
        return sums[0] if sums[0] >= sums[1] else -sums[1]

    @property
    def since(self) -> int:
        """The step at which the larger sum last left zero."""
        return self._since[0 if self._sums[0] >= self._sums[1] else 1]


@dataclass
class Watch:
    """Averages a run's training losses, and compares the averages with the forecast; fed with one row at a time."""

    forecast: Mapping[str, Any]
    points: list[dict[str, Any]] = field(default_factory=list)
    """The averages so far, each with its step, tokens and band."""
    left: dict[str, Any] | None = None
    """Step, tokens, measured value and band at which the run left the band; None while it is inside."""
    _drift: Drift | None = None
    _highest_lr: float = 0.0
    _sum: float = 0.0
    """Sum of loss times tokens so far."""
    _begun: float = 0.0
    """Value of `_sum` at the beginning of the current share."""
    _number: int = 0
    _outside: int = 0
    _tokens: float = 0.0
    _first_step: int = 0

    def __post_init__(self) -> None:
        if errors := self.forecast.get("errors"):
            self._drift = Drift(errors["correlation"], errors["law_deviation"])

    def add(
        self, step: int, tokens: float, loss: float | None, val_loss: float | None, lr: float | None = None
    ) -> dict[str, Any] | None:
        """Process one logged interval.

        Args:
            step: Completed steps at the end of the interval.
            tokens: Tokens so far.
            loss: Mean training loss of the interval, in nats per token; None if no token had a weight.
            val_loss: Held-out loss after the interval; None if it was not measured.
            lr: Learning rate of the interval's last step; None if it is not known.

        Returns:
            The value of `left` in the call in which the run leaves the band; otherwise None.
        """
        before = self.left
        ended = step >= int(self.forecast["steps"])
        if lr is not None and (planned := self.forecast.get("highest_lr")) is not None and self.left is None:
            self._highest_lr = max(self._highest_lr, lr)
            low, high = planned * (1 - SAME_LR), planned * (1 + SAME_LR)
            if lr > high or (self._highest_lr < low and step >= int(self.forecast["steps"]) / 2):
                self.left = {"step": step, "tokens": tokens, "measured": self._highest_lr, "low": low, "high": high,
                             "what": "lr"}  # fmt: skip
        if loss is not None and tokens > self._tokens:
            self._take(step, tokens, loss, ended)
        if val_loss is not None and ended:
            low, high = self.forecast["loss"].get("interval_99", self.forecast["loss"]["interval"])
            if not low <= val_loss <= high and self.left is None:
                self.left = {"step": step, "tokens": tokens, "measured": val_loss, "low": low, "high": high,
                             "what": "val_loss"}  # fmt: skip
        return self.left if before is None else None

    def _take(self, step: int, tokens: float, loss: float, ended: bool) -> None:
        """Average the shares that end in this logged interval; the sum at each end is interpolated, as in forecasts."""
        width = float(self.forecast["tokens"]) / BINS
        sparse = tokens - self._tokens > MAX_SPARSE * width
        while self._number < BINS:
            end = (self._number + 1) * width
            # A step consumes complete sequences, so the last share may have fewer tokens.
            last = ended and self._number == BINS - 1
            if end > tokens * (1 + 1e-9) and not last:
                break
            total = self._sum + loss * (min(end, tokens) - self._tokens)
            covered = min(end, tokens) - self._number * width
            if not sparse and covered > width / 2:
                self._close(step, tokens, (total - self._begun) / covered)
            self._begun = total
            self._number += 1
        self._sum += loss * (tokens - self._tokens)
        self._tokens = tokens

    def _close(self, step: int, tokens: float, mean: float) -> None:
        band = band_of(self.forecast, self._number)
        if band is None:
            return
        outside = not band["low"] <= mean <= band["high"]
        self.points.append({"step": step, "tokens": tokens, "measured": mean, **band, "outside": outside})
        if outside and not self._outside:
            self._first_step = step
        self._outside = self._outside + 1 if outside else 0
        if self._outside >= SUCCESSION and self.left is None:
            self.left = {"step": self._first_step, "tokens": tokens, "measured": mean, "low": band["low"],
                         "high": band["high"], "what": "loss"}  # fmt: skip
        if self._drift is not None:
            error = math.log(mean / band["loss"])
            found = self._drift.add(step, self._number, error, band["deviation"])
            self.points[-1]["drift"] = found
            if abs(found) > DRIFT and self.left is None:
                self.left = {"step": self._drift.since, "tokens": tokens, "measured": found, "low": -DRIFT,
                             "high": DRIFT, "what": "drift"}  # fmt: skip


def watch_rows(forecast: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Watch:
    """A `Watch` that has processed the objects of a metrics.jsonl."""
    watch = Watch(forecast)
    for row in rows:
        tokens = finite(row.get("tokens"))
        if tokens is not None:
            loss, val_loss, lr = (finite(row.get(name)) for name in ("loss", "val_loss", "lr"))
            watch.add(int(row["step"]), tokens, loss, val_loss, lr)
    return watch


def changed(run_dir: Path) -> bool:
    """Whether forecast.json differs from the one with which the run was started."""
    now = forecast_hash(run_dir)
    known = [event.get("hash") for event in read_events(run_dir / names.EVENTS) if event["event"] == "forecast"]
    try:
        record = json.loads((run_dir / names.RECORD).read_text(encoding="utf-8"))
        recorded = record.get("forecast") if isinstance(record, dict) else None
        started = True
    except (FileNotFoundError, ValueError):
        recorded, started = None, False
    return started and any(one != now for one in [recorded, *known])


def held_against(run_dir: Path) -> dict[str, Any] | None:
    """Compare a run with its forecast, for `status` and `report`; None if the run never had a forecast.

    Returns:
        `state` ("waiting", "inside", "left" or "changed"); `left`, the step, measured value and band at which the run
        left the band; `final`, the held-out loss at the end and its interval; `points`, the averages so far.
    """
    forecast = read_forecast(run_dir)
    altered = changed(run_dir)
    if forecast is None:
        return {"state": "changed", "left": None, "final": None, "points": []} if altered else None
    rows = read_metrics(run_dir / names.METRICS)
    watch = watch_rows(forecast, rows)
    ends = [row["val_loss"] for row in rows if finite(row.get("val_loss")) is not None
            and row["step"] >= int(forecast["steps"])]  # fmt: skip
    low, high = forecast["loss"]["interval"]
    final = None
    if ends:
        final = {"measured": ends[-1], "predicted": forecast["loss"]["value"], "interval": [low, high],
                 "error": forecast["loss"]["value"] / ends[-1] - 1, "inside": low <= ends[-1] <= high}  # fmt: skip
    state = "waiting" if not watch.points and final is None else "left" if watch.left else "inside"
    return {
        "state": "changed" if altered else state, "left": watch.left, "final": final, "points": watch.points,
        "created": forecast["created"], "law_hash": forecast["law_hash"],
    }  # fmt: skip
