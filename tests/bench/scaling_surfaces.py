"""Whether fits hold what they say, on simulated surfaces: `python -m tests.bench.scaling_surfaces`.

Runs of L = 1.82 + 482/N^.348 + 2085/D^.366 at 12 sizes (20M to 905M, a factor of sqrt 2) by 6 token counts (5 to 160
tokens a parameter, doubling), so that budgets of FLOPs coincide and approach 2 applies. Kinds of surface:

- clean: 0.2 % noise on each loss;
- heteroscedastic: noise falls from 0.4 % at the smallest run to 0.1 % at the largest;
- outlier: clean, and one loss 5 % too high;
- warm-up: every run loses half of N tokens, as a linear warm-up over N tokens (OLMo's rule) does; other amounts are in
  tests.bench.scaling_bias;
- edge: token counts of 40 to 1280 a parameter, all beyond the optimum.

Counted over 100 surfaces of each: how often 95 % intervals of alpha, beta, E and the loss at 10 times the largest FLOPs
hold the truth; their median width over the width of the middle 95 % of the estimates; DISAGREE; bias suspected; the
outlier named; false outliers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigtrain.config import UserError
from bigtrain.scaling import bias, diagnostics, law
from bigtrain.scaling.agreement import agreement
from bigtrain.scaling.approaches import run_approaches
from bigtrain.scaling.clustering import choose_clusters
from bigtrain.scaling.document import unpack
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.table import RunTable, groups_by_size

TRUTH = np.array([np.log(482.0), np.log(2085.0), np.log(1.82), 0.348, 0.366])
SIZES, LENGTHS = 12, 6
KINDS = ("clean", "heteroscedastic", "outlier", "warm-up", "edge")
NOISE, OUTLIER, LOST = 0.002, 1.05, 0.5
TARGET_FACTOR = 10.0
QUANTITIES = ("alpha", "beta", "E", "loss")


@dataclass(frozen=True)
class Surface:
    """Simulated runs and, for an outlier, its row."""

    table: RunTable
    outlier: int | None


def surface(kind: str, number: int, lost: FloatArray | None = None) -> Surface:
    """One surface of a kind; the same for the same number.

    Args:
        kind: One of `KINDS`.
        number: Of its noise.
        lost: Tokens that each run loses, shape (n,); None: what the kind says.
    """
    generator = np.random.default_rng((KINDS.index(kind), number))
    params = np.repeat(2e7 * 2.0 ** (np.arange(SIZES) / 2), LENGTHS)
    first = 40.0 if kind == "edge" else 5.0
    tokens = params * np.tile(first * 2.0 ** np.arange(LENGTHS), SIZES)
    flops = FLOPS_PER_PARAMETER_TOKEN * params * tokens
    noise = np.full(len(params), NOISE)
    if kind == "heteroscedastic":
        noise = 0.004 * (flops / flops.min()) ** (np.log(0.25) / np.log(flops.max() / flops.min()))
    if lost is None:
        lost = LOST * params if kind == "warm-up" else np.zeros(len(params))
    loss = law.loss(TRUTH, params, tokens - lost) * np.exp(noise * generator.normal(size=len(params)))
    row = int(generator.integers(len(params))) if kind == "outlier" else None
    if row is not None:
        loss[row] *= OUTLIER
    names = tuple(f"r{i}" for i in range(len(params)))
    return Surface(RunTable(names, groups_by_size(params), params, tokens, flops, loss, place=names, source=kind), row)


@dataclass(frozen=True)
class Seen:
    """What one fit said."""

    estimate: FloatArray
    """Shape (4,)."""
    ends: FloatArray
    """Shape (2, 4)."""
    disagree: bool
    biased: bool
    named: bool
    false_outliers: bool


def quantities(theta: FloatArray, target: float) -> FloatArray:
    """Alpha, beta, E and the loss at the target, shape (..., 4)."""
    return np.stack([theta[..., 3], theta[..., 4], np.exp(theta[..., 2]), law.optimal_loss(theta, target)], axis=-1)


def see(kind: str, number: int, replicates: int) -> Seen:
    """Fit one surface as `scaling fit` does by default, without the page."""
    made = surface(kind, number)
    table, target = made.table, TARGET_FACTOR * float(made.table.flops.max())
    options = FitOptions(replicates=replicates, processes=1, seed=number, starts=2)
    clusters, _, _ = choose_clusters(table, options)
    found = run_approaches(table, clusters, target, options)
    main = found["a3_huber"]
    assert main.fitted is not None
    many = quantities(unpack(main.result["replicates"]), target)
    far = {int(one["run"][1:]) for one in diagnostics.outliers(table, main.fitted, target)["runs"]}
    return Seen(
        quantities(main.fitted.theta, target), np.quantile(many, [0.025, 0.975], axis=0),
        agreement(found)["agree"] is False,
        bool(bias.suspected(main.fitted, table.params, table.tokens, clusters, target)),
        made.outlier in far, bool(far - {made.outlier}),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a kind."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--surfaces", type=int, default=100)
    parser.add_argument("--replicates", type=int, default=200)
    options = parser.parse_args(arguments)
    print(
        f"{options.surfaces} surfaces of each kind, {options.replicates} replicates, options of scaling fit by default"
    )
    print(f"{'':16} {'held: ' + '  '.join(QUANTITIES):34} {'width: ' + '  '.join(QUANTITIES):32} "
          "DISAGREE  bias  outlier named  false outliers")  # fmt: skip
    began = time.process_time()
    for kind in KINDS:
        target = TARGET_FACTOR * float(surface(kind, 0).table.flops.max())
        truth = quantities(TRUTH, target)
        seen = []
        for number in range(options.surfaces):
            try:
                seen.append(see(kind, number, options.replicates))
            except UserError as error:
                print(f"{kind} {number}: {error.what}")
        ends = np.array([one.ends for one in seen])
        estimates = np.array([one.estimate for one in seen])
        held = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean(axis=0)
        own = np.diff(np.quantile(estimates, [0.025, 0.975], axis=0), axis=0)[0]
        width = np.median(ends[:, 1] - ends[:, 0], axis=0) / own
        shares = [np.mean([getattr(one, name) for one in seen]) for name in
                  ("disagree", "biased", "named", "false_outliers")]  # fmt: skip
        print(f"{kind:16} {'  '.join(f'{value:6.0%}' for value in held):34} "
              f"{'  '.join(f'{value:6.2f}' for value in width):32} {shares[0]:8.0%} {shares[1]:5.0%} "
              f"{shares[2]:14.0%} {shares[3]:15.0%}", flush=True)  # fmt: skip
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
