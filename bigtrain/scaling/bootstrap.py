"""The bootstrap over clusters of runs; its result does not depend on the number of processes."""

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
"""Replicates that are refitted together; fixed, so that sums round the same with any number of processes."""
MIN_CLUSTERS = 8
"""With fewer clusters the intervals are too narrow, and a warning is printed."""
LEAST_CLUSTERS = 5
"""With fewer clusters single runs are resampled instead of clusters, and a warning is printed."""
MIN_DISTINCT = 3
"""Least number of distinct clusters in a replicate, since two sizes determine no exponent; others are sampled again."""
ALONE = 600_000
"""Largest number of runs times replicates for which one process is faster than several."""


@dataclass(frozen=True)
class Replicates:
    """The refits of one bootstrap."""

    theta: FloatArray
    """Parameters of the law for N and D that are not centred, shape (R, 5)."""
    converged: float
    """Fraction of refits that converged."""
    agreed: float
    """Fraction of refits that reached the same minimum from the full fit and from variable projection.

    Where the two differ, the lower minimum is used.
    """


def draw_weights(clusters: npt.NDArray[np.int64], seed: int, replicates: npt.ArrayLike) -> FloatArray:
    """How often each run counts in each replicate, shape (R, n); clusters are sampled with replacement.

    Args:
        clusters: Cluster of each run, shape (n,), numbered from 0.
        seed: Seed of the bootstrap. Each replicate has its own generator, seeded by (seed, its number).
        replicates: Numbers of the replicates, shape (R,).
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
    """Refit the problem to resampled clusters.

    Args:
        problem: The runs and the objective.
        theta: Centred parameters of the full fit, shape (5,). Each refit starts from them and from variable projection.
        clusters: Cluster of each run, shape (n,), numbered from 0.
        seed: Seed of the bootstrap.
        replicates: Number of replicates.
        processes: Number of processes; None: one per CPU core, but a single one for small problems.
    """
    chunks = [np.arange(low, min(low + CHUNK, replicates)) for low in range(0, replicates, CHUNK)]
    jobs = [(problem, theta, clusters, seed, chunk) for chunk in chunks]
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if replicates * len(problem.ln_n) > ALONE else 1
    if processes == 1:
        parts = [_refit(*job) for job in jobs]
    else:
        # The start method is not fork, because the caller may have threads.
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
    """The percentile interval of the finite values of replicates, as [low, high]; NaN if no value is finite."""
    known = values[np.isfinite(values)]
    if not len(known):
        return [float("nan"), float("nan")]
    return [float(value) for value in np.quantile(known, [(1 - level) / 2, (1 + level) / 2])]
