"""How often a forecast's watch sees a fault, and how often a sound run leaves: `python -m tests.bench.forecast_power`.

Sweeps of 4 sizes (10M to 80M) by 2 seeds with a trunk each, and branches of 10, 20 and 40 tokens a parameter that decay
over their last quarter, of Chinchilla's law. Noise is as in the ladder of results/forecast_trial.txt: the text that a
seed gives adds 1.6 % to the mean loss of a fortieth of a run of 30 tokens a parameter, a run's own noise is 0.4 % of
that mean, and 0.5 % in all its losses alike. The faults are

- doubled: what a doubled learning rate did to the training loss of a real run (see `DOUBLED`), which ended 0.9 % worse;
- one per cent, two per cent: a loss that rises by as much in the first half of the run, and stays there.

The planned run has 30 tokens a parameter, at 30M (inside) or 160M parameters (twice the largest); it has a seed of the
sweep (paired) or another.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.scaling import law
from bigtrain.scaling.fit import fit
from bigtrain.scaling.forecast import make_forecast
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.report import write_outputs
from bigtrain.storage import write_atomic
from bigtrain.tracking.forecast import BINS, watch_rows
from tests.bench.scaling_surfaces import TRUTH

SIZES, RATIOS, SEEDS = np.geomspace(1e7, 8e7, 4), (10.0, 20.0, 40.0), (1, 2)
STEPS, DECAY, STABLE = 400, 0.25, 0.04
TEXT, OWN, LEVEL = 0.016, 0.004, 0.005
REFERENCE = 30 * 2.7e7
"""Tokens of the run in whose fortieths the text has the noise `TEXT`; in longer runs they have less."""
CELL = REFERENCE / BINS / 50
"""Tokens with one value of the text's noise."""
DOUBLED = (-0.071, -0.040, -0.023, -0.005, 0.011, 0.016, 0.014, 0.023, 0.026, 0.029, 0.036, 0.030, 0.036, 0.020, 0.016,
           0.018, 0.017, 0.012, 0.009)  # fmt: skip
"""ln of the training loss with a doubled rate over that without, in 19 parts of a run (N 45k, D 900k, one seed)."""
FAULTS = ("sound", "doubled", "one per cent", "two per cent")


def rows_of(
    number: int, seed: int, params: float, tokens: float, first: float, last: float, fault: str = "sound"
) -> list[dict[str, Any]]:
    """The logged rows of a run from a share of its tokens to another, with a decay in its last quarter.

    Args:
        number: Of the simulated sweep.
        seed: Of the run; runs with one seed read the same text.
        params: N of the run.
        tokens: D of the run.
        first: Share of the tokens at which the rows begin.
        last: Share of the tokens at which they end.
        fault: One of `FAULTS`.
    """
    generator = np.random.default_rng((number, seed, int(params)))
    level = LEVEL * generator.normal()
    own = np.random.default_rng((number, seed, int(params), int(tokens), int(1e3 * first)))
    steps = round(STEPS * (last - first))
    share = first + (last - first) * np.arange(1, steps + 1) / steps
    ends = np.concatenate([[first], share]) * tokens
    text = np.concatenate([[0.0], np.cumsum(np.random.default_rng((number, seed)).normal(size=int(7e9 / CELL)))])
    noise = TEXT * 50**0.5 * np.diff(np.interp(ends / CELL, np.arange(len(text)), text)) / np.diff(ends / CELL)
    noise += level + OWN * (REFERENCE / BINS / np.diff(ends)) ** 0.5 * own.normal(size=steps)
    before = law.loss(TRUTH, params, np.minimum(share, 1 - DECAY) * tokens) * (1 + STABLE)
    decayed = np.clip((share - 1 + DECAY) / DECAY, 0.0, 1.0)
    loss = before * (1 - decayed) + law.loss(TRUTH, params, tokens) * decayed
    effect = {
        "sound": 0.0 * share, "doubled": np.interp(share, (np.arange(19) + 0.5) / 19, DOUBLED),
        "one per cent": 0.01 * np.minimum(2 * share, 1.0), "two per cent": 0.02 * np.minimum(2 * share, 1.0),
    }[fault]  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"step": round(STEPS * at), "tokens": tokens * at, "loss": float(value)}
        for at, value in zip(share.tolist(), (loss * np.exp(noise + effect)).tolist(), strict=True)
    ]
    if last == 1.0:
        end = level + effect[-1] + 0.001 * own.normal()
        rows[-1]["val_loss"] = float(law.loss(TRUTH, params, tokens) * np.exp(end))
    return rows


def write_sweep(sweep: Path, number: int) -> Path:
    """Write a simulated sweep and fit its law; returns the law's directory."""
    lines = []
    for params in SIZES.tolist():
        for seed in SEEDS:
            trunk, longest = f"n{params:.0f}-s{seed}-trunk", params * max(RATIOS)
            _write(sweep, trunk, rows_of(number, seed, params, longest, 0.0, 1 - DECAY))
            for ratio in RATIOS:
                name, tokens = f"n{params:.0f}-s{seed}-d{ratio:.0f}", params * ratio
                step = round(STEPS * (1 - DECAY) * ratio / max(RATIOS))
                rows = rows_of(number, seed, params, tokens, 1 - DECAY, 1.0)
                shift = step - round(STEPS * (1 - DECAY))
                _write(sweep, name, [{**row, "step": row["step"] + shift} for row in rows])
                lines.append({
                    "run": name, "group": f"n{params:.0f}", "phase": "decayed", "seed": seed, "params": params,
                    "tokens": tokens, "flops": 6 * params * tokens, "val_loss": rows[-1]["val_loss"], "parent": trunk,
                    "parent_step": step,
                })  # fmt: skip
    write_atomic(sweep / "runs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    options = FitOptions(approach="a3", loss_function="huber", replicates=100, processes=1, starts=1)
    write_outputs(fit(str(sweep), options), sweep / "law")
    return sweep / "law"


def _write(sweep: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (sweep / "trials" / name).mkdir(parents=True)
    write_atomic(sweep / "trials" / name / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each planned run and fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sweeps", type=int, default=40)
    options = parser.parse_args(arguments)
    began = time.process_time()
    left: dict[tuple[str, str, str], list[dict[str, Any] | None]] = {}
    widths: dict[tuple[str, str], list[float]] = {}
    for number in range(options.sweeps):
        with tempfile.TemporaryDirectory() as directory:
            found = write_sweep(Path(directory) / "sweep", number)
            for where, params in (("inside", 3e7), ("beyond", 1.6e8)):
                for kind, seed in (("paired", 1), ("another", 3)):
                    forecast = make_forecast(found, params, 30 * params, STEPS, [], seed)
                    widths.setdefault((where, kind), []).extend(one["deviation"] for one in forecast["curve"])
                    for fault in FAULTS:
                        rows = rows_of(number, seed, params, 30 * params, 0.0, 1.0, fault)
                        left.setdefault((where, kind, fault), []).append(watch_rows(forecast, rows).left)
    print(f"{options.sweeps} simulated sweeps of 24 runs; runs of 30 tokens a parameter")
    print(f"{'planned run':12} {'seed':8} {'deviation':>9}  {'fault':13} {'left':>6}  {'at step (median)':>16}  by")
    for (where, kind, fault), many in left.items():
        seen = [one for one in many if one is not None]
        step = f"{np.median([one['step'] for one in seen]):.0f} of {STEPS}" if seen else "-"
        by = {what: sum(one["what"] == what for one in seen) for what in ("loss", "drift", "val_loss")}
        print(f"{where:12} {kind:8} {np.median(widths[where, kind]):9.2%}  {fault:13} {len(seen) / len(many):6.1%}  "
              f"{step:>16}  {', '.join(f'{what} {count}' for what, count in by.items() if count)}")  # fmt: skip
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
