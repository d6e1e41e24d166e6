"""Laws of the best learning rate and the best batch, fitted to tables that sweep them.

At each (N, D, B), a parabola in ln LR through the points around the lowest loss gives the optimum LR*. At each (N, D),
a parabola in ln B through the lowest loss of each batch gives B*. A lowest loss at the edge of its grid determines no
parabola and is refused. The law of LR* is linear in ln N, ln D and ln B, as far as the runs vary them. The law of B* is
linear in ln D or in ln L (McCandlish et al. 2018: B ~ L^-1/alpha; Bi et al. 2024: powers of compute). Intervals are t
intervals of least squares: the scatter of the optima around the law, whatever its cause, is taken as their error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from bigtrain.config import UserError
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.runs.numbers import count
from bigtrain.scaling.runs.table import MIN_SPREAD, SHOWN, RunTable, groups_by_size

Setting = Literal["lr", "batch"]
Edges = Literal["refuse", "drop"]
NAMES: dict[Setting, str] = {"lr": "learning rate", "batch": "batch"}
SIDE = 2
"""Largest number of points on each side of the lowest point to which a parabola is fitted."""
NEAR = 0.03
"""Largest relative height above the lowest loss of a point to which a parabola is fitted."""
MIN_VALUES = 3
LOSS_SPREAD = 0.02
"""Least standard deviation of ln L from which an exponent can be fitted; for ln N, ln D and ln B see `MIN_SPREAD`."""
LEVEL = 0.95


@dataclass(frozen=True)
class Optimum:
    """The best value of a setting at one (N, D) or (N, D, B)."""

    params: float
    tokens: float
    batch: float | None
    """B, for an optimal learning rate of runs whose batch is known; otherwise None."""
    value: float
    """The optimal value, at the vertex of the parabola; NaN if the optimum is refused."""
    loss: float
    """Loss at the vertex; the lowest measured loss if the optimum is refused."""
    tried: list[float]
    """The values of the setting that were tried, in rising order."""
    losses: list[float]
    """Loss of each value that was tried, a mean over seeds; infinite if a run diverged."""
    parabola: list[float]
    """Coefficients of the parabola in ln of the setting, the highest power first; empty if the optimum is refused."""
    refused: str = ""
    """Why there is no optimum; empty if there is one."""


@dataclass(frozen=True)
class PowerLaw:
    """The power law ln y = c0 + sum c_i (ln x_i - mean_i) of k variables, fitted by least squares."""

    names: tuple[str, ...]
    """Names of the variables x: of "params", "tokens", "batch" and "loss"."""
    coefficients: FloatArray
    """The coefficients c0, c1, ..., shape (1 + k,)."""
    covariance: FloatArray
    """Covariance of the coefficients, shape (1 + k, 1 + k)."""
    means: FloatArray
    """Means of ln x, shape (k,)."""
    deviation: float
    """Standard deviation of ln y of one optimum around the law."""
    dof: int
    """Degrees of freedom of the fit."""
    spans: tuple[tuple[float, float], ...]
    """Smallest and largest fitted value of each x."""

    def at(self, **values: float) -> dict[str, Any]:
        """The law's `value`, its 95 % `interval`, and `outside`: the variables that are outside the fitted range.

        Args:
            values: A value for each variable of the law, by name; further ones are ignored.

        Raises:
            KeyError: The value of a variable of the law is missing.
        """
        point = np.concatenate([[1.0], np.log([values[name] for name in self.names]) - self.means])
        ln = float(point @ self.coefficients)
        half = self._quantile * math.sqrt(float(point @ self.covariance @ point))
        outside = [name for name, (low, high) in zip(self.names, self.spans, strict=True)
                   if not low * 0.99 <= values[name] <= high * 1.01]  # fmt: skip
        return {"value": math.exp(ln), "interval": [math.exp(ln - half), math.exp(ln + half)], "outside": outside}

    def plain(self) -> dict[str, Any]:
        """The law as plain values for rates.json: y = value_at_means * product (x / mean)^exponent."""
        ends = self._quantile * np.sqrt(np.diag(self.covariance))
        return {
            "names": list(self.names), "value_at_means": math.exp(self.coefficients[0]),
            "means": {name: math.exp(mean) for name, mean in zip(self.names, self.means, strict=True)},
            "exponents": {
                name: {"value": float(self.coefficients[i]),
                       "interval": [float(self.coefficients[i] + sign * ends[i]) for sign in (-1, 1)]}
                for i, name in enumerate(self.names, 1)
            },
            "coefficients": self.coefficients.tolist(), "covariance": self.covariance.tolist(),
            "deviation": self.deviation, "dof": self.dof, "spans": [list(span) for span in self.spans],
        }  # fmt: skip

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> PowerLaw:
        """The inverse of `plain`."""
        names = tuple(plain["names"])
        return cls(
            names, np.array(plain["coefficients"]), np.array(plain["covariance"]),
            np.log([plain["means"][name] for name in names]), plain["deviation"], plain["dof"],
            tuple((low, high) for low, high in plain["spans"]),
        )  # fmt: skip

    @property
    def _quantile(self) -> float:
        return float(stats.t.ppf((1 + LEVEL) / 2, self.dof))


def rate_laws(table: RunTable, edges: Edges) -> dict[str, Any]:
    """The laws of the learning rate and the batch, as far as the table sweeps them.

    Args:
        table: Runs with N, D, loss, and learning rate or batch or both. A run with an infinite or missing loss counts
            as diverged.
        edges: What to do with an optimum at the edge of its grid: refuse the table, or drop the optimum.

    Returns:
        Plain values for JSON: under "lr" and "batch" the optima and their laws; under "notes" remarks on the fit.

    Raises:
        UserError: No setting is swept, an optimum lies at an edge and `edges` is "refuse", or too few optima remain.
    """
    notes: list[str] = []
    found: dict[str, Any] = {}
    for setting, column in _settings(table).items():
        best = optima(table, setting) if column is not None else []
        if best:
            kept = _without_edges(best, setting, edges, table.source, notes)
            found[setting] = {
                "optima": [asdict(one) for one in best], **_laws(setting, kept, table.source, notes)
            }  # fmt: skip
    if not found:
        raise UserError(
            "No learning rate and no batch is swept: each pair (N, D) has fewer than three values", table.source,
            "Train each size at three or more learning rates, for example with the section learning_rates of a "
            "sweep's YAML.",
        )  # fmt: skip
    return {**found, "notes": notes}


def _settings(table: RunTable) -> dict[Setting, FloatArray | None]:
    return {"lr": table.lr, "batch": table.batch}


def optima(table: RunTable, setting: Setting) -> list[Optimum]:
    """The optimum of a setting at each (N, D), and for the learning rate at each (N, D, B), by rising N.

    Cells with fewer than three different values are skipped.
    """
    column = _settings(table)[setting]
    assert column is not None
    sizes, lengths = groups_by_size(table.params), groups_by_size(table.tokens)
    cells: dict[tuple[str, str, float | None], list[int]] = {}
    known = np.isfinite(column) & (column > 0) & np.isfinite(table.params) & np.isfinite(table.tokens)
    for i in np.flatnonzero(known).tolist():
        has_batch = setting == "lr" and table.batch is not None and np.isfinite(table.batch[i])
        batch = float(table.batch[i]) if has_batch and table.batch is not None else None
        cells.setdefault((sizes[i], lengths[i], batch), []).append(i)
    found = []
    for (_, _, batch), rows in cells.items():
        tried = sorted({float(column[i]) for i in rows})
        if len(tried) < MIN_VALUES:
            continue
        losses = [_lowest(table, [i for i in rows if column[i] == value], setting) for value in tried]
        where = (float(table.params[rows].mean()), float(table.tokens[rows].mean()), batch)
        found.append(_optimum(where, tried, losses, setting))
    return sorted(found, key=lambda one: (one.params, one.tokens, one.batch or 0.0))


def _lowest(table: RunTable, rows: list[int], setting: Setting) -> float:
    """The mean loss over the seeds of some rows; for the batch, the lowest such mean over the learning rates."""
    rates: dict[float, list[float]] = {}
    for i in rows:
        rate = float(table.lr[i]) if setting == "batch" and table.lr is not None else 0.0
        loss = float(table.loss[i])
        rates.setdefault(rate, []).append(loss if math.isfinite(loss) and loss > 0 else math.inf)
    return min(float(np.mean(losses)) for losses in rates.values())


def _optimum(
    where: tuple[float, float, float | None], tried: list[float], losses: list[float], setting: Setting
) -> Optimum:
    x, y = np.log(tried), np.array(losses)
    lowest = int(np.argmin(y))
    at = Optimum(*where, math.nan, float(y[lowest]), tried, losses, [])

    def refused(why: str) -> Optimum:
        return Optimum(**{**asdict(at), "refused": why})

    if not np.isfinite(y[lowest]):
        return refused("all runs diverged")
    if lowest in (0, len(x) - 1):
        end = "smallest" if lowest == 0 else "largest"
        return refused(f"the best {NAMES[setting]}, {tried[lowest]:.3g}, is the {end} tried")
    window = [lowest]
    for way in (-1, 1):
        for step in range(1, SIDE + 1):
            i = lowest + way * step
            if not 0 <= i < len(x) or not (step == 1 or y[i] <= y[lowest] * (1 + NEAR)):
                break
            if np.isfinite(y[i]):
                window.append(i)
    if min(window) == lowest or max(window) == lowest:
        return refused(f"all runs on one side of the best {NAMES[setting]}, {tried[lowest]:.3g}, diverged")
    parabola = np.polyfit(x[window], y[window], 2)
    vertex = -parabola[1] / (2 * parabola[0])
    if parabola[0] <= 0 or not x[min(window)] <= vertex <= x[max(window)]:
        return refused(f"no parabola with a minimum fits around the best {NAMES[setting]}, {tried[lowest]:.3g}")
    return Optimum(*where, math.exp(vertex), float(np.polyval(parabola, vertex)), tried, losses, parabola.tolist())


def _without_edges(
    best: Sequence[Optimum], setting: Setting, edges: Edges, source: str, notes: list[str]
) -> list[Optimum]:
    refused = [one for one in best if one.refused]
    if not refused:
        return list(best)
    shown = "; ".join(f"N {count(one.params)}, D {count(one.tokens)}: {one.refused}" for one in refused[:SHOWN])
    more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    text = f"{len(refused)} of {len(best)} grids of the {NAMES[setting]} have no optimum inside: {shown}{more}"
    if edges == "refuse":
        raise UserError(text, source, "Train beyond those edges, or give --edges drop to fit the others.")
    notes.append(f"{text}; they are not fitted")
    return [one for one in best if not one.refused]


def _laws(setting: Setting, best: Sequence[Optimum], source: str, notes: list[str]) -> dict[str, Any]:
    """The law of a setting's optima. For the batch, the better of the laws in D and in the loss, and the other one."""
    if setting == "lr":
        columns = {"params": [one.params for one in best], "tokens": [one.tokens for one in best]}
        if all(one.batch is not None for one in best):
            columns["batch"] = [one.batch or math.nan for one in best]
        return {"law": power_law(columns, best, setting, source, notes).plain()}
    by = {"tokens": power_law({"tokens": [one.tokens for one in best]}, best, setting, source, notes)}
    if float(np.log([one.loss for one in best]).std()) >= LOSS_SPREAD:
        by["loss"] = power_law({"loss": [one.loss for one in best]}, best, setting, source, notes)
    clearer = min(by, key=lambda name: by[name].deviation)
    return {"law": by[clearer].plain(), "by": clearer, "others": {n: by[n].plain() for n in by if n != clearer}}


def power_law(
    columns: dict[str, list[float]], best: Sequence[Optimum], setting: Setting, source: str, notes: list[str]
) -> PowerLaw:
    """Fit a power law of the optima in those variables that vary independently of the ones before.

    Args:
        columns: Values of each variable at the optima, by name.
        best: The optima.
        setting: The setting, for messages.
        source: Name of the table, for messages.
        notes: List to which notes about omitted variables are added.

    Raises:
        UserError: There are fewer than three optima, or no variable varies.
    """
    design: FloatArray = np.ones((len(best), 1))
    names: list[str] = []
    means: list[float] = []
    for name, column in columns.items():
        x = np.log(column) - np.log(column).mean()
        own = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
        # At least one degree of freedom must remain, from which the error is estimated.
        if float(own.std()) < (LOSS_SPREAD if name == "loss" else MIN_SPREAD) or len(best) < design.shape[1] + 2:
            if float(x.std()) > 0:
                before = " and ".join(names) or "the others"
                notes.append(f"the law of the {NAMES[setting]} has no term in {name}, which follows from {before} here")
            continue
        design = np.column_stack([design, x])
        names.append(name)
        means.append(float(np.log(column).mean()))
    if not names:
        raise UserError(
            f"{len(best)} optima of the {NAMES[setting]} give no law: three at different {' or '.join(columns)} are "
            "needed", source, "Sweep it at more sizes.",
        )  # fmt: skip
    y = np.log([one.value for one in best])
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    rest = y - design @ coefficients
    dof = len(y) - design.shape[1]
    variance = float(rest @ rest) / dof
    spans = tuple((min(columns[name]), max(columns[name])) for name in names)
    return PowerLaw(
        tuple(names), coefficients, variance * inverse, np.array(means), math.sqrt(variance), dof, spans
    )  # fmt: skip
