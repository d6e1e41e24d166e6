"""The expected precision of a pair of ladders: the width of the interval of the compute multiplier of two recipes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from bigtrain.scaling import law
from bigtrain.sweeps.config import ExpectedConfig
from bigtrain.sweeps.design import Grid, truth_of

_STEP = 1e-4


@dataclass(frozen=True)
class ExpectedPair:
    """First-order estimate of the 95 % interval of the compute multiplier between two recipes on one ladder."""

    paired_width: float
    """Ratio of the interval's ends minus 1, if both ladders have the same seeds."""
    unpaired_width: float
    """Ratio of the interval's ends minus 1, if the ladders have different seeds."""
    flops: float
    """FLOPs of both ladders, with every run trained from step 0."""
    clusters: int
    """Number of trunks of one ladder."""


def expect_pair(grid: Grid, expected: ExpectedConfig) -> ExpectedPair:
    """The widths for a grid that is trained twice, by the law and noise of `expected`.

    With s = -d ln L / d ln C at each run, the estimate of ln m is the mean of (difference of ln L of a pair) / s,
    weighted by s^2. With the same seeds, the noise of a trunk is the same in both runs of a pair and cancels.
    """
    truth = truth_of(expected)
    half = np.exp(_STEP / 2)
    less = law.loss(truth, grid.params / half, grid.tokens / half)
    slope = np.log(less / law.loss(truth, grid.params * half, grid.tokens * half)) / (2 * _STEP)
    whole = float((slope**2).sum())
    by_trunk = np.bincount(grid.trunk, weights=slope)
    own = 2 * expected.noise**2 / whole
    trunks = 2 * expected.trunk_noise**2 * float((by_trunk**2).sum()) / whole**2

    def width(variance: float, dof: int) -> float:
        return float(np.exp(2 * stats.t.ppf(0.975, max(dof, 1)) * np.sqrt(variance)) - 1)

    return ExpectedPair(
        width(own, grid.trunks - 1), width(own + trunks, 2 * grid.trunks - 2), 2 * float(grid.flops.sum()), grid.trunks
    )
