"""How often `scaling fit` suspects biased runs, beside the best test: `python -m tests.bench.scaling_bias`.

Surfaces as in tests.bench.scaling_surfaces (72 runs, 0.2 % noise). A linear warm-up over W tokens loses about W/2 of
them. So OLMo's rule, a warm-up of N tokens, loses N/2 in every run; shorter warm-ups lose less. A warm-up of one length
for all runs loses a part of the shortest run.

The last column is the bound: the Neyman-Pearson test that knows the form of the bias, the noise and the law but for
five nuisance parameters, at the same level. No test that keeps the level does better on these runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
from scipy import stats

from bigtrain.scaling import bias, law, parametric
from bigtrain.scaling.clustering import choose_clusters
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.table import RunTable
from tests.bench.scaling_surfaces import NOISE, TARGET_FACTOR, TRUTH, surface

OF_N = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
OF_SHORTEST = (1 / 80, 1 / 40, 1 / 20)


def fitted(table: RunTable) -> parametric.ParametricFit:
    """The law by Huber, as `scaling fit` has it first."""
    return parametric.fit(Problem.of(table.params, table.tokens, table.loss), 0, starts=0)


def flagged(table: RunTable) -> tuple[bool, float]:
    """Whether bias is suspected, and the law's beta."""
    clusters, _, _ = choose_clusters(table, FitOptions())
    target = TARGET_FACTOR * float(table.flops.max())
    fit = fitted(table)
    return bool(bias.suspected(fit, table.params, table.tokens, clusters, target)), float(fit.theta[4])


def bound(table: RunTable, lost: FloatArray) -> float:
    """Power of the most powerful test at `bias.LEVEL` against this loss of tokens, shape (n,)."""
    shift = np.log(law.loss(TRUTH, table.params, table.tokens - lost) / law.loss(TRUTH, table.params, table.tokens))
    jacobian = parametric.log_jacobian(TRUTH, np.log(table.params), np.log(table.tokens))
    own = shift - jacobian @ np.linalg.lstsq(jacobian, shift, rcond=None)[0]
    return float(stats.norm.cdf(np.linalg.norm(own) / NOISE - stats.norm.ppf(1 - bias.LEVEL)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a kind of surface."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--surfaces", type=int, default=200)
    options = parser.parse_args(arguments)
    began = time.process_time()
    print(f"{options.surfaces} surfaces of each kind, level {bias.LEVEL:.0%}; beta of the truth {TRUTH[4]:.3f}")
    print(f"{'tokens lost':34} {'flagged':>8} {'best test':>10} {'median beta':>12}")
    for kind in ("clean", "heteroscedastic", "edge"):
        seen = [flagged(surface(kind, 1000 + number).table) for number in range(options.surfaces)]
        _line(f"none, {kind}", seen, bias.LEVEL)
    base = surface("clean", 0).table
    cases = [(f"{share:g} N", share * base.params) for share in OF_N]
    shortest = float(base.tokens.min())
    cases += [(f"{share:g} of the shortest run", np.full(len(base), share * shortest)) for share in OF_SHORTEST]
    for name, lost in cases:
        seen = [flagged(surface("clean", 2000 + number, lost).table) for number in range(options.surfaces)]
        _line(name, seen, bound(base, lost))
    print(f"{time.process_time() - began:.0f} s of processor time")


def _line(name: str, seen: Sequence[tuple[bool, float]], best: float) -> None:
    share, beta = np.mean([one for one, _ in seen]), np.median([beta for _, beta in seen])
    print(f"{name:34} {share:8.1%} {best:10.1%} {beta:12.3f}", flush=True)


if __name__ == "__main__":
    main()
