"""What a pair of ladders can be expected to say of two recipes: the width of their compute multiplier's interval."""

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
    """The 95 % interval of a multiplier over the ladder, to first order."""

    paired_width: float
    """Its ends' ratio less 1, where both ladders have the same seeds."""
    unpaired_width: float
    """Likewise with other seeds."""
    flops: float
    """Of both ladders, 6 N D, without what trunks save."""
    clusters: int


def expect_pair(grid: Grid, expected: ExpectedConfig) -> ExpectedPair:
    """The widths for this grid trained twice, by the law and noise of `expected`.

    With s = -d ln L / d ln C at each run, ln m is the mean of the pairs' differences over s, weighted by s^2. A trunk's
    noise is shared by a pair, and so cancels where seeds are the same.
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
