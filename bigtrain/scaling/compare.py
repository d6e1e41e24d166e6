"""The compute multiplier of recipe B over recipe A: the ratio of A's to B's FLOPs at the same loss.

Both recipes share one law L(N, D), in which a run of B counts as a run with m times the compute:
ln L_B(N, D) = ln L(N m^1/2, D m^1/2), with ln m = u + g (ln C - mean ln C). At equal tokens, m multiplies D alone. The
misfit of the law is the same for both recipes on one grid, so it does not bias m.

Two runs with the same size, length and seed are a pair. bigtrain guarantees that they read the data in the same order,
whatever the recipe and the size. Only the difference within a pair is used, so the effect of the seed cancels.
Intervals are t intervals of least squares. Their variance is estimated from clusters of runs with the same size and
seed; without pairs, a cluster also holds only one recipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from bigtrain.config import UserError
from bigtrain.scaling import law, parametric
from bigtrain.scaling.batched import refit
from bigtrain.scaling.frontier import fit_frontier
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.runs.numbers import count, parse_number
from bigtrain.scaling.runs.table import RunTable, groups_by_size, refuse_collinear

Cost = Literal["flops", "tokens", "time"]
SAME_LENGTH = 0.02
"""Largest relative difference of token counts of one recipe that count as one length."""
NEAR_SIZE = 0.3
"""Largest difference in ln N of two recipes' sizes that count as one rung, if each is the nearest to the other."""
NEAR_LENGTH = 0.1
"""Largest difference in ln D, or in ln D/N, of two recipes' lengths at one rung that count as one cell.

The lengths may differ because D is rounded to full batches.
"""
LEVEL = 0.95
MIN_CELLS = 3
_TIME = ("seconds", "train_s", "wall_s", "train_seconds", "time_s", "runtime", "_runtime")
_ROUNDS = 3
_STEP = 1e-4
_MAX_SEEDS = 200


@dataclass(frozen=True)
class Cells:
    """The runs of both recipes, grouped into cells of one size and length; each array has shape (n,)."""

    params: FloatArray
    tokens: FloatArray
    ln_loss: FloatArray
    ln_cost: FloatArray
    """ln of a run's FLOPs or seconds; of its 6 N D if the recipes are compared at equal tokens."""
    is_b: npt.NDArray[np.bool_]
    """Whether a run is of recipe B."""
    cell: npt.NDArray[np.int64]
    """Number of the run's cell, which stands for a size and a length."""
    cluster: npt.NDArray[np.int64]
    """Number of the run's cluster: a size and a seed, and also a recipe if runs are not paired."""
    seed: tuple[str, ...]
    paired: bool
    """Whether the runs of A and B with the same size, length and seed are pairs."""


def compare(first: RunTable, second: RunTable, target: float | None, cost: Cost, pair: bool | None) -> dict[str, Any]:
    """The multiplier of recipe B over recipe A, as the mean over the ladder and at a target.

    Args:
        first: Runs of recipe A.
        second: Runs of recipe B.
        target: FLOPs at which the multiplier is extrapolated; None: ten times the FLOPs of the largest run.
        cost: The quantity that is equal in the comparison.
        pair: Whether runs are compared in pairs; None: in pairs if enough runs share their seeds.

    Returns:
        Plain values for JSON: `ladder`, `target`, `points` (one per cell), `resolved`, `advice` and counts of runs.

    Raises:
        UserError: The ladders have too few common cells, `pair` is set and too few runs share their seeds, or `cost`
            is "time" and a table has no measured times.
    """
    cells = match(first, second, cost, pair)
    scale = _Law(cells, cost)
    middle = float(np.log(6 * cells.params * cells.tokens).mean())
    at_target = math.log(target or 10 * float(max(first.flops.max(), second.flops.max()))) - middle
    constant = _estimate(cells, scale, [1.0])
    slope = _estimate(cells, scale, [1.0, at_target])
    found: dict[str, Any] = {
        "ladder": _multiplier(constant[0], constant[1], constant[2]),
        "target": {"flops": math.exp(at_target + middle), **_multiplier(slope[0], slope[1], slope[2])},
        "cost": cost, "paired": cells.paired, "cells": len(np.unique(cells.cell)),
        "clusters": len(np.unique(cells.cluster)), "runs": [int((~cells.is_b).sum()), int(cells.is_b.sum())],
        "points": _points(cells, scale),
    }  # fmt: skip
    low, high = found["ladder"]["interval"]
    found["resolved"] = not low <= 1.0 <= high
    found["advice"] = None if found["resolved"] else _advice(cells, scale, constant)
    return found


def _multiplier(value: float, deviation: float, quantile: float) -> dict[str, Any]:
    return {
        "value": math.exp(value), "interval": [math.exp(value + sign * quantile * deviation) for sign in (-1, 1)],
        "standard_error": deviation,
    }  # fmt: skip


def match(first: RunTable, second: RunTable, cost: Cost, pair: bool | None) -> Cells:
    """The runs of both tables in cells that both tables have; in pairs only if `Cells.paired`.

    Raises:
        UserError: There are too few common cells, `pair` is set and too few runs share their seeds, or `cost` is
            "time" and a table has no measured times.
    """
    sizes = _sizes(first, second)
    lengths = _lengths(first, second, sizes)
    seeds = (_seeds(first), _seeds(second))
    rows: list[tuple[int, int, str, int, int]] = []
    for recipe, table in enumerate((first, second)):
        for i in range(len(table)):
            rows.append((sizes[recipe][i], lengths[recipe][i], seeds[recipe][i], recipe, i))
    both = [{row[:2] for row in rows if row[3] == recipe} for recipe in (0, 1)]
    common = sorted(both[0] & both[1])
    if len(common) < MIN_CELLS:
        raise UserError(
            f"The two ladders have {len(common)} pairs (N, D) in common, {MIN_CELLS} are needed", second.source,
            "Train both recipes at the same sizes and token counts: bigtrain sweep plan --compare",
        )  # fmt: skip
    keyed = [{row[:3] for row in rows if row[3] == recipe and row[:2] in set(common)} for recipe in (0, 1)]
    shared = keyed[0] & keyed[1]
    known = bool(first.seed) and bool(second.seed)
    paired = known and len(shared) >= MIN_CELLS if pair is None else pair
    if pair and len(shared) < MIN_CELLS:
        raise UserError(
            f"{len(shared)} runs of the ladders share size, length and seed", second.source,
            "Give both sweeps the same seeds, or compare with --unpaired.",
        )  # fmt: skip
    kept = [row for row in rows if (row[:3] in shared if paired else row[:2] in set(common))]
    return _cells((first, second), kept, cost, paired)


def _cells(tables: Sequence[RunTable], kept: list[tuple[int, int, str, int, int]], cost: Cost, paired: bool) -> Cells:
    def column(name: str) -> FloatArray:
        return np.array([float(getattr(tables[row[3]], name)[row[4]]) for row in kept])

    params, tokens = column("params"), column("tokens")
    if cost == "time":
        times = [_times(table) for table in tables]
        spent = np.array([times[row[3]][row[4]] for row in kept])
    else:
        spent = column("flops") if cost == "flops" else 6 * params * tokens
    numbers: dict[object, int] = {}

    def number(key: object) -> int:
        return numbers.setdefault(key, len(numbers))

    clusters = [number((row[0], row[2]) if paired else (row[0], row[2], row[3], row[4] if not row[2] else 0))
                for row in kept]  # fmt: skip
    cells = [number(("cell", row[0], row[1])) for row in kept]
    return Cells(
        params, tokens, np.log(column("loss")), np.log(spent), np.array([row[3] == 1 for row in kept]),
        np.unique(cells, return_inverse=True)[1], np.unique(clusters, return_inverse=True)[1],
        tuple(row[2] for row in kept), paired,
    )  # fmt: skip


def _sizes(first: RunTable, second: RunTable) -> tuple[list[int], list[int]]:
    """The rung of each run of both tables.

    Two recipes rarely have exactly the same N, so sizes that are nearest to each other form one rung.
    """
    ladders = [np.log(sorted({float(name) for name in groups_by_size(table.params)})) for table in (first, second)]
    gaps = np.abs(ladders[0][:, None] - ladders[1])
    rungs = [np.arange(len(ladders[0])), -1 - np.arange(len(ladders[1]))]
    for b in range(len(ladders[1])):
        a = int(np.argmin(gaps[:, b]))
        if gaps[a, b] < NEAR_SIZE and int(np.argmin(gaps[a])) == b:
            rungs[1][b] = a
    found = []
    for table, ladder, rung in zip((first, second), ladders, rungs, strict=True):
        own = np.log([float(name) for name in groups_by_size(table.params)])
        found.append([int(rung[np.argmin(np.abs(ladder - one))]) for one in own])
    return found[0], found[1]


def _lengths(first: RunTable, second: RunTable, sizes: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """The number of each run's length within its size, for both tables.

    Two lengths are the same if D or D/N agrees, since a recipe with slightly more N may train slightly longer.
    """
    found: list[list[int]] = [[0] * len(first), [0] * len(second)]
    for size in set(sizes[0]) | set(sizes[1]):
        rows = [np.flatnonzero(np.array(one) == size) for one in sizes]
        known = np.log(_distinct(first.tokens[rows[0]]))
        both = len(rows[0]) and len(rows[1])
        larger = math.log(second.params[rows[1][0]] / first.params[rows[0][0]]) if both else 0.0
        for recipe, (table, own) in enumerate(zip((first, second), rows, strict=True)):
            others = _distinct(table.tokens[own])
            for i in own.tolist():
                length = min(others, key=lambda other: abs(math.log(other / float(table.tokens[i]))))
                gap = math.log(length) - known
                distance = np.minimum(np.abs(gap), np.abs(gap - larger * recipe))
                near = int(np.argmin(distance)) if len(distance) else -1
                close = near >= 0 and distance[near] < NEAR_LENGTH
                found[recipe][i] = near if close else -1 - others.index(length)
    return found[0], found[1]


def _distinct(tokens: FloatArray) -> list[float]:
    """Token counts in rising order, where counts within 2 % of each other appear once."""
    kept: list[float] = []
    for value in np.sort(tokens).tolist():
        if not kept or value > kept[-1] * (1 + SAME_LENGTH):
            kept.append(value)
    return kept


def _seeds(table: RunTable) -> tuple[str, ...]:
    return table.seed or ("",) * len(table)


def _times(table: RunTable) -> FloatArray:
    name = next((one for one in _TIME if one in table.raw), None)
    if name is None:
        raise UserError(
            "There is no column of measured times", table.source,
            f"Name the column one of {', '.join(_TIME[:4])}, or compare by FLOPs.",
        )  # fmt: skip
    return np.array([parse_number(value) or math.nan for value in table.raw[name]])


class _Law:
    """The law that both recipes share, and the effect of a multiplier on its loss."""

    def __init__(self, cells: Cells, cost: Cost) -> None:
        self._grows = (0.0, 1.0) if cost == "tokens" else (0.5, 0.5)
        self._theta: FloatArray | None = None
        shift = np.zeros(len(cells.params))
        table = RunTable(
            ("",) * len(shift), groups_by_size(cells.params), cells.params, cells.tokens,
            6 * cells.params * cells.tokens, np.exp(cells.ln_loss),
        )  # fmt: skip
        parametric_law, equal_exponents = True, False
        try:
            refuse_collinear(table, len(law.NAMES))
        except UserError:
            # Two sizes determine one exponent (alpha = beta, as in Muennighoff et al. 2023); one D/N, a law in C.
            distinct = [
                len(set(groups_by_size(one))) for one in (table.params, table.tokens, table.tokens / table.params)
            ]
            equal_exponents = parametric_law = distinct[0] >= 2 and distinct[1] >= 3 and distinct[2] >= 2
        self.variants: list[FloatArray] = []
        """Parameters of the law, refitted without each cluster in turn."""
        for _ in range(_ROUNDS):
            n, d = (np.exp(np.log(column) + grow * shift) for column, grow in
                    zip((cells.params, cells.tokens), self._grows, strict=True))  # fmt: skip
            if parametric_law:
                fitted = parametric.fit(Problem.of(n, d, table.loss, equal_exponents=equal_exponents), 0, starts=0)
                self._theta = fitted.theta
            else:
                self._frontier = fit_frontier(6 * n * d, table.loss[None], float(np.exp(np.log(6 * n * d).mean())))
            value = _estimate(cells, self, [1.0])[0] - _cost_gap(cells)
            shift = np.where(cells.is_b, value, 0.0)
        if parametric_law:
            without = np.array([cells.cluster != c for c in np.unique(cells.cluster)], dtype=np.float64)
            self.variants = list(fitted.problem.uncentred(refit(fitted.problem, without, fitted.centred).theta))

    def ln_loss(
        self, params: FloatArray, tokens: FloatArray, ln_m: FloatArray, theta: FloatArray | None = None
    ) -> FloatArray:
        """ln L of runs that count as runs with m times their compute, shape (n,).

        Args:
            params: N of the runs, shape (n,).
            tokens: D of the runs, shape (n,).
            ln_m: ln of the multiplier of each run, shape (n,).
            theta: Parameters of the law; None: the fitted ones.
        """
        n, d = params * np.exp(self._grows[0] * ln_m), tokens * np.exp(self._grows[1] * ln_m)
        if self._theta is not None:
            return np.log(law.loss(self._theta if theta is None else theta, n, d))
        return np.log(self._frontier.loss(6 * n * d))

    def slope(
        self, params: FloatArray, tokens: FloatArray, ln_m: FloatArray, theta: FloatArray | None = None
    ) -> FloatArray:
        """The derivative -d ln L / d ln m at each run, shape (n,); for arguments see `ln_loss`."""
        ends = [self.ln_loss(params, tokens, ln_m + sign * _STEP, theta) for sign in (-1, 1)]
        return np.maximum((ends[0] - ends[1]) / (2 * _STEP), 1e-6)


def _cost_gap(cells: Cells) -> float:
    """Mean over the cells of ln(cost of a run of A / cost of a run of B)."""
    gaps = [cells.ln_cost[(cells.cell == c) & ~cells.is_b].mean() - cells.ln_cost[(cells.cell == c) & cells.is_b].mean()
            for c in np.unique(cells.cell)]  # fmt: skip
    return float(np.mean(gaps))


def _estimate(cells: Cells, scale: _Law, at: list[float]) -> tuple[float, float, float]:
    """ln m at one point, its standard error and the quantile of its t distribution, by Gauss-Newton.

    Args:
        cells: The runs.
        scale: The law that both recipes share.
        at: [1.0] for a constant ln m; [1.0, ln C - mean ln C] for a linear one, evaluated at that C.
    """
    ln_c = np.log(6 * cells.params * cells.tokens)
    terms = np.column_stack([np.ones(len(ln_c)), ln_c - ln_c.mean()])[:, : len(at)]
    labels = np.column_stack([cells.cell, cells.cluster]) if cells.paired else cells.cell[:, None]
    groups = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    beta = np.zeros(len(at))
    for _ in range(8):
        design, excess = _linear(cells, scale, terms, groups, beta, None)
        step = np.linalg.lstsq(design, excess, rcond=None)[0]
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            break
    deviation, dof = _robust(design, excess - design @ step, cells.cluster, np.array(at))
    if not cells.paired:
        # The mean of a cell, over k runs of several clusters, was subtracted from its rows. This makes the deviation
        # too small by a factor sqrt((k - 1) / k), and takes one degree of freedom per size.
        inside = np.bincount(groups).mean()
        deviation *= math.sqrt(inside / max(inside - 1, 1))
        dof = max(dof - len(set(groups_by_size(cells.params[~cells.is_b]))), 1)
    moved = []
    for theta in scale.variants:
        design, excess = _linear(cells, scale, terms, groups, beta, theta)
        moved.append(float(np.linalg.lstsq(design, excess, rcond=None)[0] @ at))
    if moved:
        # The uncertainty of the law itself, by the jackknife over clusters (Quenouille 1956).
        spread = np.array(moved) - np.mean(moved)
        deviation = math.hypot(deviation, math.sqrt((len(moved) - 1) / len(moved) * float(spread @ spread)))
    gap = _cost_gap(cells)
    return float(beta @ at) + gap, deviation, float(stats.t.ppf((1 + LEVEL) / 2, dof))


def _linear(
    cells: Cells, scale: _Law, terms: FloatArray, groups: npt.NDArray[np.int64], beta: FloatArray,
    theta: FloatArray | None,
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """The linear problem around `beta`: derivatives of ln L by `beta`, shape (n, k), and excess log losses, (n,)."""
    ln_m = np.where(cells.is_b, terms @ beta, 0.0)
    slope = scale.slope(cells.params, cells.tokens, ln_m, theta)
    excess = cells.ln_loss - scale.ln_loss(cells.params, cells.tokens, ln_m, theta)
    design = _within(np.where(cells.is_b, -slope, 0.0)[:, None] * terms, groups)
    return design, _within(excess[:, None], groups)[:, 0]


def _within(columns: FloatArray, groups: npt.NDArray[np.int64]) -> FloatArray:
    """Columns minus the mean of each row's group, shape (n, k)."""
    sizes = np.bincount(groups)
    return np.asarray(
        columns - np.stack([np.bincount(groups, weights=c)[groups] / sizes[groups] for c in columns.T], axis=1)
    )


def _robust(
    design: FloatArray, rest: FloatArray, cluster: npt.NDArray[np.int64], at: FloatArray
) -> tuple[float, float]:
    """Cluster-robust standard deviation (CR3, the jackknife form) of at @ beta, and its degrees of freedom."""
    inverse = np.linalg.pinv(design.T @ design)
    scores = []
    for c in np.unique(cluster):
        rows = cluster == c
        own = design[rows]
        leverage = own @ inverse @ own.T
        scores.append(own.T @ np.linalg.pinv(np.eye(int(rows.sum())) - leverage) @ rest[rows])
    table = np.array(scores)
    count_of = len(table)
    # Clusters of unequal weight give fewer degrees of freedom (Satterthwaite 1946).
    weight = np.bincount(np.unique(cluster, return_inverse=True)[1], weights=(design**2)[:, 0])
    dof = max(float(weight.sum() ** 2 / (weight**2).sum()) - len(at), 1.0)
    covariance = (count_of - 1) / count_of * inverse @ (table.T @ table) @ inverse
    return math.sqrt(max(float(at @ covariance @ at), 1e-18)), dof


def _points(cells: Cells, scale: _Law) -> list[dict[str, Any]]:
    """The multiplier that each cell alone gives, by rising FLOPs."""
    found: list[dict[str, Any]] = []
    for c in np.unique(cells.cell):
        a, b = (cells.cell == c) & ~cells.is_b, (cells.cell == c) & cells.is_b
        slope = scale.slope(cells.params[b], cells.tokens[b], np.zeros(int(b.sum()))).mean()
        difference = float(cells.ln_loss[a].mean() - cells.ln_loss[b].mean())
        size = scale.ln_loss(cells.params[a], cells.tokens[a], np.zeros(int(a.sum()))).mean() - scale.ln_loss(
            cells.params[b], cells.tokens[b], np.zeros(int(b.sum()))
        ).mean()  # fmt: skip
        gap = float(cells.ln_cost[a].mean() - cells.ln_cost[b].mean())
        found.append({
            "params": [float(cells.params[a].mean()), float(cells.params[b].mean())],
            "tokens": float(cells.tokens[a].mean()), "flops": float(np.exp(cells.ln_cost[a].mean())),
            "loss": [float(np.exp(cells.ln_loss[a].mean())), float(np.exp(cells.ln_loss[b].mean()))],
            "runs": [int(a.sum()), int(b.sum())], "multiplier": math.exp((difference - float(size)) / slope + gap),
        })  # fmt: skip
    return sorted(found, key=lambda one: one["flops"])


def _advice(cells: Cells, scale: _Law, estimate: tuple[float, float, float]) -> str:
    """Advice how many more seeds would resolve the multiplier, at the size where this costs the fewest FLOPs.

    Args:
        cells: The runs.
        scale: The law that both recipes share.
        estimate: The result of `_estimate` for a constant multiplier.
    """
    value, deviation, quantile = estimate
    slope = scale.slope(cells.params, cells.tokens, np.zeros(len(cells.params)))
    whole = float((slope[cells.is_b] ** 2).sum())
    best: tuple[float, int, float] | None = None
    for name in sorted(set(groups_by_size(cells.params[cells.is_b])), key=float):
        near = cells.is_b & (np.abs(np.log(cells.params / float(name))) < 0.02)
        seeds = max(len(set(np.array(cells.seed)[near])), 1)
        gained = float((slope[near] ** 2).sum()) / seeds / whole
        short = (quantile * deviation / max(abs(value), 1e-9)) ** 2 - 1
        more = math.ceil(max(short, 0.0) / gained)
        price = more * float((6 * cells.params * cells.tokens)[near].sum()) / seeds
        if more <= _MAX_SEEDS and (best is None or price < best[0]):
            best = (price, more, float(name))
    if best is None:
        return f"not resolved, and {_MAX_SEEDS} more seeds of any size would not: the recipes are as good as equal"
    return (
        f"not resolved: {best[1]} more seeds of size {count(best[2])} would, if the multiplier is {math.exp(value):.3f}"
    )
