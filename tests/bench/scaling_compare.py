"""Whether multipliers of `scaling compare` hold: `python -m tests.bench.scaling_compare`.

Ladders of Chinchilla's law: the first 2 to 5 of 5 sizes (10M to 160M) by 3 token counts (10, 20 and 40 tokens a
parameter) by 2 to 4 seeds; recipe B counts as m times its compute. The target is ten times the largest run's FLOPs. All
runs of a size and seed share 0.2 % of noise, each run has 0.1 % of its own (the defaults of a sweep's `expected`).
Paired ladders have the same seeds, so that a pair shares the first part; unpaired ones, of the same cost, have other
seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from bigtrain.scaling import law
from bigtrain.scaling.compare import compare
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.runs.table import RunTable, groups_by_size
from tests.bench.scaling_surfaces import TRUTH

MULTIPLIERS = (1.0, 1.02, 1.1, 1.5)
DESIGNS = ("5x2", "5x3", "5x4", "4x2", "3x2", "2x2")
SIZES, RATIOS, SEEDS = np.geomspace(1e7, 1.6e8, 5), np.array([10.0, 20.0, 40.0]), 2
SHARED, OWN = 0.002, 0.001


def ladder(multiplier: float, first_seed: int, shared: FloatArray, generator: np.random.Generator) -> RunTable:
    """One recipe's runs; `shared` has a draw for each size and seed, shape (sizes, seeds)."""
    sizes, seeds = shared.shape
    params = np.repeat(SIZES[:sizes], len(RATIOS) * seeds)
    tokens = params * np.tile(np.repeat(RATIOS, seeds), sizes)
    seed = np.tile(np.arange(seeds), sizes * len(RATIOS))
    size = np.repeat(np.arange(sizes), len(RATIOS) * seeds)
    noise = SHARED * shared[size, seed] + OWN * generator.normal(size=len(params))
    loss = law.loss(TRUTH, params * multiplier**0.5, tokens * multiplier**0.5) * np.exp(noise)
    names = tuple(f"r{i}" for i in range(len(params)))
    return RunTable(
        names, groups_by_size(params), params, tokens, 6 * params * tokens, loss,
        seed=tuple(str(first_seed + one) for one in seed), place=names, source="simulated",
    )  # fmt: skip


def measure(multiplier: float, paired: bool, draws: int, sizes: int, seeds: int) -> tuple[float, float, float]:
    """Shares of intervals over the ladder and at the target that hold the multiplier; median width in ln m."""
    held, far, widths = [], [], []
    for draw in range(draws):
        generator = np.random.default_rng((int(1000 * multiplier), draw, sizes, seeds))
        noise = generator.normal(size=(2, sizes, seeds))
        first = ladder(1.0, 0, noise[0], generator)
        second = ladder(multiplier, 0 if paired else seeds, noise[0 if paired else 1], generator)
        found = compare(first, second, None, "flops", paired)
        low, high = found["ladder"]["interval"]
        held.append(low <= multiplier <= high)
        widths.append(np.log(high / low))
        low, high = found["target"]["interval"]
        far.append(low <= multiplier <= high)
    return float(np.mean(held)), float(np.mean(far)), float(np.median(widths))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a multiplier."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--multipliers", type=float, nargs="+", default=MULTIPLIERS)
    parser.add_argument("--designs", nargs="+", default=DESIGNS, metavar="SIZESxSEEDS")
    options = parser.parse_args(arguments)
    began = time.process_time()
    print(f"{options.draws} pairs of ladders, 95 % intervals")
    print(f"{'sizes x seeds':13} {'B over A':>9} {'paired: held':>13} {'at target':>10} {'width':>7} "
          f"{'unpaired: held':>15} {'at target':>10} {'width':>7} {'paired/unpaired':>16}")  # fmt: skip
    for design in options.designs:
        sizes, seeds = map(int, design.split("x"))
        for multiplier in options.multipliers:
            one, other = (measure(multiplier, paired, options.draws, sizes, seeds) for paired in (True, False))
            print(f"{design:13} {multiplier:9.2f} {one[0]:13.1%} {one[1]:10.1%} {one[2]:7.3f} {other[0]:15.1%} "
                  f"{other[1]:10.1%} {other[2]:7.3f} {one[2] / other[2]:16.2f}", flush=True)  # fmt: skip
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
