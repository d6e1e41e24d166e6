"""The interval that a grid of runs can be expected to give at the target, and the best grid for a budget.

The expected interval comes from simulated sweeps, each fitted as `bigtrain scaling fit` fits a real one. To compare
many grids, a first-order estimate ranks them: least squares at the assumed law, with noise that the branches of a trunk
share, gives the covariance of the law's parameters and the variance of the loss at the target. Only the best grids of
that ranking are then simulated; a plan is always simulated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.scaling import law, parametric
from bigtrain.scaling.bootstrap import MIN_CLUSTERS
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.runs.table import RunTable
from bigtrain.sweeps.config import ExpectedConfig

DRAWS = 60
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Grid:
    """The runs of a plan, one array per quantity, each of shape (runs,)."""

    params: FloatArray
    """N of each run."""
    tokens: FloatArray
    """D of each run."""
    flops: FloatArray
    trunk: npt.NDArray[np.int64]
    """Index of each run's trunk, from 0."""

    @property
    def trunks(self) -> int:
        """Number of trunks, which are the clusters of the fit's bootstrap."""
        return int(self.trunk.max()) + 1

    def table(self, truth: FloatArray, source: str) -> RunTable:
        """The runs in the form that a fit reads, with the losses of an assumed law.

        Args:
            truth: The law's (ln A, ln B, ln E, alpha, beta).
            source: Name of the table in messages.
        """
        names = tuple(str(number) for number in self.trunk)
        return RunTable(
            run=tuple(f"r{i}" for i in range(len(self.params))), group=names, params=self.params, tokens=self.tokens,
            flops=self.flops, loss=law.loss(truth, self.params, self.tokens), source=source,
        )  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """The predictions of simulated sweeps at the target; each interval holds the middle 95 % of them."""

    loss: float
    """Loss of the assumed law at the target."""
    loss_interval: tuple[float, float]
    params_interval: tuple[float, float]
    """Interval of N*, the optimal number of parameters at the target."""
    params: float
    """N* of the assumed law at the target."""
    exponent_interval: tuple[float, float]
    """Interval of a in N* ~ C^a."""
    draws: int
    """Number of simulated sweeps."""

    @property
    def width(self) -> float:
        """Width of the loss's interval, relative to the loss of the assumed law."""
        return (self.loss_interval[1] - self.loss_interval[0]) / self.loss


def truth_of(expected: ExpectedConfig) -> FloatArray:
    """The assumed law's (ln A, ln B, ln E, alpha, beta)."""
    one = expected
    return np.array([np.log(one.A), np.log(one.B), np.log(one.E), one.alpha, one.beta])


def simulate(grid: Grid, expected: ExpectedConfig, target: float, draws: int, seed: int = 0) -> Expected:
    """Fit simulated sweeps of a grid, each with independent noise.

    Args:
        grid: The runs of each sweep.
        expected: The assumed law and noise.
        target: The target's FLOPs.
        draws: Number of simulated sweeps.
        seed: Seed of the noise.
    """
    truth = truth_of(expected)
    clean = law.loss(truth, grid.params, grid.tokens)
    found = np.empty((draws, 5))
    for draw in range(draws):
        generator = np.random.default_rng((seed, draw))
        noise = expected.trunk_noise * generator.normal(size=grid.trunks)[grid.trunk]
        noise = noise + expected.noise * generator.normal(size=len(clean))
        found[draw] = parametric.fit(Problem.of(grid.params, grid.tokens, clean * np.exp(noise)), draw, starts=0).theta

    def middle(values: FloatArray) -> tuple[float, float]:
        low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
        return float(low), float(high)

    return Expected(
        float(law.optimal_loss(truth, target)), middle(law.optimal_loss(found, target)),
        middle(law.optimal_params(found, target)), float(law.optimal_params(truth, target)),
        middle(law.exponent(found)), draws,
    )  # fmt: skip


def linear_width(grid: Grid, expected: ExpectedConfig, target: float) -> float:
    """First-order estimate of the relative width of the 95 % interval of the loss at the target.

    Args:
        grid: The runs.
        expected: The assumed law and noise.
        target: The target's FLOPs.

    Returns:
        The width; infinite if the grid does not determine all parameters of the law.
    """
    truth = truth_of(expected)
    ln_n, ln_d = np.log(grid.params), np.log(grid.tokens)
    jacobian = parametric.log_jacobian(truth, ln_n, ln_d)
    scale = np.linalg.norm(jacobian, axis=0)
    pseudo = np.linalg.pinv(jacobian / scale, rcond=1e-10)
    shared = (grid.trunk[:, None] == grid.trunk[None]).astype(np.float64)
    noise = expected.trunk_noise**2 * shared + expected.noise**2 * np.eye(len(ln_n))
    covariance = pseudo @ noise @ pseudo.T / np.outer(scale, scale)
    step = 1e-5
    ends = [np.log(law.optimal_loss(truth + sign * step * np.eye(5), target)) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    variance = float(slope @ covariance @ slope)
    if np.linalg.matrix_rank(jacobian / scale, tol=1e-8) < jacobian.shape[1] or not variance >= 0:
        return float("inf")
    return 2 * NORMAL_95 * variance**0.5


@dataclass(frozen=True)
class Choice:
    """A grid that fills a budget: every size at every D/N, with several seeds."""

    sizes: tuple[int, ...]
    tokens_per_param: tuple[float, ...]
    seeds: int
    flops: float
    linear_width: float
    expected: Expected | None = None


SIZE_COUNTS = (5, 6, 8, 10)
SIZE_FACTORS = (10.0, 25.0, 60.0)
RATIOS = (
    (5.0, 10.0, 20.0, 40.0),
    (5.0, 10.0, 20.0, 40.0, 80.0),
    (10.0, 20.0, 40.0, 80.0),
    (2.5, 5.0, 10.0, 20.0, 40.0),
)
SEED_COUNTS = (1, 2, 3)
FINALISTS = 5


def choose(
    budget_flops: float,
    expected: ExpectedConfig,
    target: float,
    decay: float,
    smallest: int,
    say: Callable[[str], None],
) -> list[Choice]:
    """Grids that cost the budget, the narrowest expected interval first.

    The cost of a run is 6 N D FLOPs; the steps that branches share in a trunk count once.

    Args:
        budget_flops: The budget, in FLOPs of all trials together.
        expected: The assumed law and noise.
        target: The target's FLOPs.
        decay: Fraction of each run's steps that its branch trains itself.
        smallest: The smallest N that a size may have.
        say: A function that prints a line of progress.
    """
    candidates = []
    for count, factor, ratios, seeds in itertools.product(SIZE_COUNTS, SIZE_FACTORS, RATIOS, SEED_COUNTS):
        shares = np.geomspace(1.0, 1.0 / factor, count)
        work = (1 - decay) * max(ratios) + decay * sum(ratios)
        largest = (budget_flops / (FLOPS_PER_PARAMETER_TOKEN * seeds * work * float((shares**2).sum()))) ** 0.5
        sizes = tuple(int(float(f"{largest * share:.2g}")) for share in shares[::-1])
        if sizes[0] < smallest:
            continue
        grid = regular_grid(sizes, ratios, seeds)
        if target <= float(grid.flops.max()) or grid.trunks < MIN_CLUSTERS:
            continue
        cost = FLOPS_PER_PARAMETER_TOKEN * seeds * work * sum(float(size) ** 2 for size in sizes)
        candidates.append(Choice(sizes, ratios, seeds, cost, linear_width(grid, expected, target)))
    candidates.sort(key=lambda one: one.linear_width)
    finalists = []
    for number, one in enumerate(candidates[:FINALISTS], 1):
        say(f"simulating grid {number} of {min(FINALISTS, len(candidates))} ({len(candidates)} were compared)")
        grid = regular_grid(one.sizes, one.tokens_per_param, one.seeds)
        known = simulate(grid, expected, target, DRAWS)
        finalists.append(Choice(one.sizes, one.tokens_per_param, one.seeds, one.flops, one.linear_width, known))
    return sorted(finalists, key=lambda one: one.expected.width if one.expected else float("inf"))


def regular_grid(sizes: Sequence[int], ratios: Sequence[float], seeds: int) -> Grid:
    """The grid of every size at every D/N, with one trunk for each size and seed."""
    params = np.repeat(np.array(sizes, dtype=np.float64), len(ratios) * seeds)
    tokens = params * np.tile(np.array(ratios), len(sizes) * seeds)
    trunk = np.repeat(np.arange(len(sizes) * seeds), len(ratios))
    return Grid(params, tokens, FLOPS_PER_PARAMETER_TOKEN * params * tokens, trunk)
