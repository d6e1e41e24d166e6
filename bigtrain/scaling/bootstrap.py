"""The bootstrap over runs, by clusters; its result does not depend on the number of processes."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from bigtrain.scaling.batched import refit, robust_weights
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem

REPLICATES = 1000
CHUNK = 125
"""Replicates that are refitted together, whatever the number of processes: sums then round the same."""
MIN_CLUSTERS = 8
"""Below it, intervals are too narrow: a warning says so."""
LEAST_CLUSTERS = 5
"""Below it clusters cannot be resampled: single runs are, with a warning."""
MIN_DISTINCT = 3
"""Clusters that a replicate must hold, since two sizes have no exponent; one with fewer is sampled again."""
ALONE = 600_000
"""Runs times replicates below which further processes cost more than they save."""


@dataclass(frozen=True)
class Replicates:
    """The refits of one bootstrap."""

    theta: FloatArray
    """Shape (R, 5), of N and D themselves."""
    converged: float
    """Share of refits that converged."""
    agreed: float
    """Share of refits whose warm start and variable projection ended in one minimum; the lower one counts."""


def draw_weights(clusters: npt.NDArray[np.int64], seed: int, replicates: npt.ArrayLike) -> FloatArray:
    """How often each run counts in each replicate, shape (R, n): clusters are sampled with replacement.

    Args:
        clusters: The cluster of each run, shape (n,), numbered from 0.
        seed: Seed of the bootstrap; each replicate has a generator of its own, from (seed, its number).
        replicates: Their numbers, shape (R,).
    """
    count = int(clusters.max()) + 1
    out = []
    for number in np.asarray(replicates).tolist():
        generator = np.random.default_rng((seed, number))
        sampled = np.bincount(generator.integers(0, count, count), minlength=count)
        while np.count_nonzero(sampled) < min(MIN_DISTINCT, count):
            sampled = np.bincount(generator.integers(0, count, count), minlength=count)
        out.append(sampled[clusters])
    return np.array(out, dtype=np.float64)


def bootstrap(
    problem: Problem,
    theta: FloatArray,
    clusters: npt.NDArray[np.int64],
    seed: int = 0,
    replicates: int = REPLICATES,
    processes: int | None = None,
) -> Replicates:
    """Refit the problem under resampled clusters.

    Args:
        problem: The runs and what is minimised.
        theta: Shape (5,), centred: the full fit, from which each refit starts (and from variable projection).
        clusters: Shape (n,).
        processes: How many to use; None: one a processor.
    """
    chunks = [np.arange(low, min(low + CHUNK, replicates)) for low in range(0, replicates, CHUNK)]
    jobs = [(problem, theta, clusters, seed, chunk) for chunk in chunks]
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if replicates * len(problem.ln_n) > ALONE else 1
    if processes == 1:
        parts = [_refit(*job) for job in jobs]
    else:
        # Not fork: the caller may have threads.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(_refit, *zip(*jobs, strict=True)))
    return Replicates(
        problem.uncentred(np.concatenate([part[0] for part in parts])),
        float(np.mean(np.concatenate([part[1] for part in parts]))),
        float(np.mean(np.concatenate([part[2] for part in parts]))),
    )


def _refit(
    problem: Problem, theta: FloatArray, clusters: npt.NDArray[np.int64], seed: int, numbers: npt.NDArray[np.int64]
) -> tuple[FloatArray, np.ndarray, np.ndarray]:
    ends = refit(problem, draw_weights(clusters, seed, numbers), theta, robust_weights(problem, theta))
    return ends.theta, ends.converged, ends.agreed


def interval(values: FloatArray, level: float = 0.95) -> list[float]:
    """The percentile interval of replicates, without those that are not finite."""
    known = values[np.isfinite(values)]
    if not len(known):
        return [float("nan"), float("nan")]
    return [float(value) for value in np.quantile(known, [(1 - level) / 2, (1 + level) / 2])]
