"""The compute multiplier of recipe B over recipe A: how many times B's FLOPs A needs for the same loss.

Each run's log loss is L(N, D) of one law for both recipes, where B's runs count as runs of m times the compute:
ln L_B(N, D) = ln L(N m^1/2, D m^1/2), with ln m = u + g (ln C - mean ln C). The law's own misfit is the same for both
recipes on one grid and so leaves m alone. Two runs that share size, length, seed and so the order of the data (which
bigtrain guarantees across recipes and sizes) are a pair, and only the difference of the two enters: what the seed does
to both cancels. Intervals are t intervals of weighted least squares, with the variance that clusters (the pair's, or
the run's, size and seed) show.
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
"""Relative: token counts of one recipe that are one length."""
NEAR_SIZE = 0.3
"""ln of N within which sizes of two recipes are one rung of the ladder, each the nearest to the other."""
NEAR_LENGTH = 0.1
"""ln of D, or of D/N, within which lengths of two recipes at one rung are one cell; whole batches round D."""
LEVEL = 0.95
MIN_CELLS = 3
_TIME = ("seconds", "train_s", "wall_s", "train_seconds", "time_s", "runtime", "_runtime")
_ROUNDS = 3
_STEP = 1e-4
_MAX_SEEDS = 200


@dataclass(frozen=True)
class Cells:
    """Runs of both recipes in cells of one size and length, a row a run; shape (n,) each."""

    params: FloatArray
    tokens: FloatArray
    ln_loss: FloatArray
    ln_cost: FloatArray
    """ln of the FLOPs or seconds that a run cost; of 6 N D where tokens are equal."""
    is_b: npt.NDArray[np.bool_]
    cell: npt.NDArray[np.int64]
    """Size and length."""
    cluster: npt.NDArray[np.int64]
    """Size and seed, the recipe too where runs are not paired."""
    seed: tuple[str, ...]
    paired: bool


def compare(first: RunTable, second: RunTable, target: float | None, cost: Cost, pair: bool | None) -> dict[str, Any]:
    """The multiplier of the second table's recipe over the first's, over the ladder and at a target.

    Args:
        first: Runs of recipe A.
        second: Runs of recipe B.
        target: FLOPs at which the multiplier is wanted; None: ten times the largest run's.
        cost: What is equal where the recipes are compared.
        pair: Whether runs are compared in pairs; None: where seeds are known and shared.

    Raises:
        UserError: Ladders without common cells, seeds that are not shared, or no times.
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
    """The runs of both tables that lie in common cells.

    Raises:
        UserError: Too few common cells, or what `pair` or `cost` needs is missing.
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
            "train both recipes at the same sizes and token counts: bigtrain sweep plan --compare",
        )  # fmt: skip
    keyed = [{row[:3] for row in rows if row[3] == recipe and row[:2] in set(common)} for recipe in (0, 1)]
    shared = keyed[0] & keyed[1]
    known = bool(first.seed) and bool(second.seed)
    paired = known and len(shared) >= MIN_CELLS if pair is None else pair
    if pair and len(shared) < MIN_CELLS:
        raise UserError(
            f"{len(shared)} runs of the ladders share size, length and seed", second.source,
            "give both sweeps the same seeds, or compare with --unpaired",
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
    """The rung of each run: sizes that are each other's nearest, since two recipes rarely have the very same N."""
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
    """The length of each run, numbered within its size.

    Two lengths are one where D agrees, or where D/N does: a recipe with a little more N trains a little longer.
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
    """Token counts, those within 2 % of each other once."""
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
            f"call it one of {', '.join(_TIME[:4])}, or compare by FLOPs",
        )  # fmt: skip
    return np.array([parse_number(value) or math.nan for value in table.raw[name]])


class _Law:
    """The law that both recipes share, and what a multiplier does to its loss."""

    def __init__(self, cells: Cells, cost: Cost) -> None:
        self._grows = (0.0, 1.0) if cost == "tokens" else (0.5, 0.5)
        self._theta: FloatArray | None = None
        shift = np.zeros(len(cells.params))
        table = RunTable(
            ("",) * len(shift), groups_by_size(cells.params), cells.params, cells.tokens,
            6 * cells.params * cells.tokens, np.exp(cells.ln_loss),
        )  # fmt: skip
        try:
            refuse_collinear(table, 5)
            parametric_law = True
        except UserError:
            parametric_law = False
        self.variants: list[FloatArray] = []
        """Parameters of the law without each cluster."""
        for _ in range(_ROUNDS):
            n, d = (np.exp(np.log(column) + grow * shift) for column, grow in
                    zip((cells.params, cells.tokens), self._grows, strict=True))  # fmt: skip
            if parametric_law:
                fitted = parametric.fit(Problem.of(n, d, table.loss), 0, starts=0)
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
        """ln L of runs that count as m times their compute; by other parameters where they are given."""
        n, d = params * np.exp(self._grows[0] * ln_m), tokens * np.exp(self._grows[1] * ln_m)
        if self._theta is not None:
            return np.log(law.loss(self._theta if theta is None else theta, n, d))
        return np.log(self._frontier.loss(6 * n * d))

    def slope(
        self, params: FloatArray, tokens: FloatArray, ln_m: FloatArray, theta: FloatArray | None = None
    ) -> FloatArray:
        """-d ln L / d ln m, shape (n,)."""
        ends = [self.ln_loss(params, tokens, ln_m + sign * _STEP, theta) for sign in (-1, 1)]
        return np.maximum((ends[0] - ends[1]) / (2 * _STEP), 1e-6)


def _cost_gap(cells: Cells) -> float:
    """By how much a run of B costs less than one of A in the same cell, in ln."""
    gaps = [cells.ln_cost[(cells.cell == c) & ~cells.is_b].mean() - cells.ln_cost[(cells.cell == c) & cells.is_b].mean()
            for c in np.unique(cells.cell)]  # fmt: skip
    return float(np.mean(gaps))


def _estimate(cells: Cells, scale: _Law, at: list[float]) -> tuple[float, float, float]:
    """ln m at `at` in (1, ln C - mean), its standard error and the t quantile; by Gauss-Newton."""
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
        # The rows of a cell are less their mean, which lies in several clusters: k / (k - 1), and a mean for each size.
        inside = np.bincount(groups).mean()
        deviation *= math.sqrt(inside / max(inside - 1, 1))
        dof = max(dof - len(set(groups_by_size(cells.params[~cells.is_b]))), 1)
    moved = []
    for theta in scale.variants:
        design, excess = _linear(cells, scale, terms, groups, beta, theta)
        moved.append(float(np.linalg.lstsq(design, excess, rcond=None)[0] @ at))
    if moved:
        # The jackknife over clusters (Quenouille 1956), of the law alone.
        spread = np.array(moved) - np.mean(moved)
        deviation = math.hypot(deviation, math.sqrt((len(moved) - 1) / len(moved) * float(spread @ spread)))
    gap = _cost_gap(cells)
    return float(beta @ at) + gap, deviation, float(stats.t.ppf((1 + LEVEL) / 2, dof))


def _linear(
    cells: Cells, scale: _Law, terms: FloatArray, groups: npt.NDArray[np.int64], beta: FloatArray,
    theta: FloatArray | None,
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """The linear problem around `beta`: derivatives by its elements, shape (n, k), and the excess of the log loss."""
    ln_m = np.where(cells.is_b, terms @ beta, 0.0)
    slope = scale.slope(cells.params, cells.tokens, ln_m, theta)
    excess = cells.ln_loss - scale.ln_loss(cells.params, cells.tokens, ln_m, theta)
    design = _within(np.where(cells.is_b, -slope, 0.0)[:, None] * terms, groups)
    return design, _within(excess[:, None], groups)[:, 0]


def _within(columns: FloatArray, groups: npt.NDArray[np.int64]) -> FloatArray:
    """Columns less the mean of each row's group."""
    sizes = np.bincount(groups)
    return np.asarray(
        columns - np.stack([np.bincount(groups, weights=c)[groups] / sizes[groups] for c in columns.T], axis=1)
    )


def _robust(
    design: FloatArray, rest: FloatArray, cluster: npt.NDArray[np.int64], at: FloatArray
) -> tuple[float, float]:
    """Deviation of at @ beta by clusters (the jackknife form, CR3), and its degrees of freedom."""
    inverse = np.linalg.pinv(design.T @ design)
    scores = []
    for c in np.unique(cluster):
        rows = cluster == c
        own = design[rows]
        leverage = own @ inverse @ own.T
        scores.append(own.T @ np.linalg.pinv(np.eye(int(rows.sum())) - leverage) @ rest[rows])
    table = np.array(scores)
    count_of = len(table)
    # Clusters that weigh unequally count as fewer (Satterthwaite 1946).
    weight = np.bincount(np.unique(cluster, return_inverse=True)[1], weights=(design**2)[:, 0])
    dof = max(float(weight.sum() ** 2 / (weight**2).sum()) - len(at), 1.0)
    covariance = (count_of - 1) / count_of * inverse @ (table.T @ table) @ inverse
    return math.sqrt(max(float(at @ covariance @ at), 1e-18)), dof


def _points(cells: Cells, scale: _Law) -> list[dict[str, Any]]:
    """The multiplier of each cell by itself."""
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
    """How many more seeds of the size whose runs say most for their FLOPs would resolve the estimate."""
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
