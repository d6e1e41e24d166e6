"""The frontier law L(C) = E + A C^-a, fitted to the lowest loss at each FLOPs value that approach 1 or 2 finds.

It assumes no form in N and D, so it checks the loss of approach 3 at the optimum. The fit is by variable projection:
for each exponent of a grid, E and A come from non-negative least squares on relative errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bigtrain.scaling.backtest import FACTORS
from bigtrain.scaling.bootstrap import interval
from bigtrain.scaling.document import pack
from bigtrain.scaling.law import FloatArray

MIN_POINTS = 4
_GRID = np.exp(np.linspace(np.log(0.005), np.log(1.0), 400))
_RESAMPLES = 500


@dataclass(frozen=True)
class FrontierLaw:
    """R frontier laws, each array of shape (R,)."""

    floor: FloatArray
    """The irreducible loss E."""
    scale: FloatArray
    """The coefficient A, for C in units of `unit`."""
    exponent: FloatArray
    """The exponent a."""
    unit: float
    """Unit of C, in FLOPs."""

    def loss(self, flops: float | FloatArray) -> FloatArray:
        """The loss of each law at C FLOPs; `flops` is broadcast against shape (R,)."""
        return np.asarray(self.floor + self.scale * (np.asarray(flops) / self.unit) ** -self.exponent)


def fit_frontier(flops: FloatArray, losses: FloatArray, unit: float) -> FrontierLaw:
    """Fit R frontier laws to m points.

    Args:
        flops: FLOPs of the points, shape (m,).
        losses: Losses of the points in each replicate, shape (R, m); NaN if a replicate lacks the point.
        unit: Unit of C for the coefficient A, in FLOPs.
    """
    powers = (flops / unit) ** -_GRID[:, None]
    known = np.isfinite(losses)
    weight = np.where(known, 1.0 / np.where(known, losses, 1.0) ** 2, 0.0)
    target = np.where(known, losses, 0.0)
    # Sums over the points for every replicate and exponent, shape (R, G).
    one, first, second = weight.sum(axis=1)[:, None], weight @ powers.T, weight @ (powers**2).T
    own, mixed = (weight * target).sum(axis=1)[:, None], (weight * target) @ powers.T
    total = (weight * target**2).sum(axis=1)[:, None]
    determinant = np.maximum(one * second - first**2, 1e-300)
    floor, scale = (second * own - first * mixed) / determinant, (one * mixed - first * own) / determinant
    negative = floor < 0
    floor, scale = np.where(negative, 0.0, floor), np.where(negative, mixed / second, scale)
    rest = total - 2 * floor * own - 2 * scale * mixed + floor**2 * one + 2 * floor * scale * first + scale**2 * second
    rest = np.where(scale > 0, rest, np.inf)
    best = np.argmin(rest, axis=1)
    rows = np.arange(len(losses))
    return FrontierLaw(floor[rows, best], scale[rows, best], _GRID[best], unit)


def frontier_document(
    flops: FloatArray, losses: FloatArray, replicates: FloatArray, target: float, seed: int
) -> dict[str, Any] | None:
    """The part of law.json about a frontier law, with intervals and back-tests; None for fewer than four points.

    Args:
        flops: FLOPs of the points, shape (m,).
        losses: Losses of the points, shape (m,).
        replicates: Resampled losses of the points, shape (R, m). If R is 0, residuals are resampled instead.
        target: FLOPs at which the loss is predicted.
        seed: Seed of the resampling of residuals.
    """
    if len(flops) < MIN_POINTS:
        return None
    unit = float(np.exp(np.log(flops).mean()))
    own = fit_frontier(flops, losses[None], unit)
    fitted = own.loss(flops)
    if not len(replicates):
        residual = losses / fitted - 1
        sampled = np.random.default_rng((seed, 3)).choice(residual, (_RESAMPLES, len(flops)))
        replicates = fitted * (1 + sampled * np.sqrt(len(flops) / max(len(flops) - 3, 1)))
    enough = np.isfinite(replicates).sum(axis=1) >= MIN_POINTS
    many = fit_frontier(flops, replicates[enough], unit)
    return {
        "E": float(own.floor[0]), "A": float(own.scale[0]), "a": float(own.exponent[0]), "unit_flops": unit,
        "interval": {"E": interval(many.floor), "a": interval(many.exponent)},
        "target": {"flops": target, "loss": float(own.loss(target)[0]), "interval": interval(many.loss(target))},
        "points": [{"flops": c, "loss": measured, "fitted": predicted} for c, measured, predicted in
                   zip(flops.tolist(), losses.tolist(), fitted.tolist(), strict=True)],
        "back_tests": _back_tests(flops, losses, replicates[enough], unit),
        "replicates": pack(np.column_stack([many.floor, many.scale, many.exponent])),
    }  # fmt: skip


def _back_tests(flops: FloatArray, losses: FloatArray, replicates: FloatArray, unit: float) -> list[dict[str, Any]]:
    """Fits of the points up to 1/factor of the largest FLOPs, each with its prediction for the largest point."""
    last = int(np.argmax(flops))
    found = []
    for factor in FACTORS:
        few = flops <= flops[last] / factor
        if few.sum() < MIN_POINTS:
            continue
        predicted = float(fit_frontier(flops[few], losses[None, few], unit).loss(flops[last])[0])
        enough = np.isfinite(replicates[:, few]).sum(axis=1) >= MIN_POINTS
        many = fit_frontier(flops[few], replicates[enough][:, few], unit).loss(flops[last])
        found.append({
            "factor": float(flops[last] / flops[few].max()), "points": int(few.sum()), "predicted": predicted,
            "prediction_interval": interval(many), "measured": float(losses[last]),
            "error": predicted / float(losses[last]) - 1,
        })  # fmt: skip
    return found
