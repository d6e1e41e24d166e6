"""A learning-rate law of small Llamas, held against the largest size: `python -m tests.bench.rates_trial`.

Packs the source of Python's standard library, tunes the learning rate at four sizes by `bigtrain sweep run`, fits
`bigtrain scaling rates` to the three smaller sizes, and compares the rate that the law gives for the largest size with
the optimum that was measured there. The result goes to tests/bench/results/rates_trial.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "tests" / "bench" / "results" / "rates_trial.txt"
FACTORS = [0.25, 0.5, 1, 2, 4]
LARGEST = 30_000
"""Parameters above which a size is held out."""
WANTED = 1.4
"""Largest factor between the predicted and the measured best rate."""
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


def main() -> int:
    """Train, fit, compare and print; returns 1 if the prediction is off by more than WANTED."""
    parser = argparse.ArgumentParser(prog="rates_trial", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="directory of shards and runs; existing ones are used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        measured, smaller = trial(work)
    found, law = measured["laws"]["lr"]["optima"], smaller["best"]["lr"]
    best = max(found, key=lambda one: float(one["params"]))
    ratio = max(law["value"] / best["value"], best["value"] / law["value"])
    lines = [
        "Best learning rates of small Llamas; FP32, a token a byte of Python's standard library, D = 20 N, one seed.",
        "$ python -m tests.bench.rates_trial",
        "",
        f"{'N':>8}{'D':>10}{'batch':>8}{'best rate':>12}{'loss':>9}   rates that were tried: loss of each",
    ]
    for one in sorted(found, key=lambda one: float(one["params"])):
        tried = ", ".join(f"{lr:.4g}: {loss:.4f}" for lr, loss in zip(one["tried"], one["losses"], strict=True))
        lines.append(
            f"{one['params']:8,.0f}{one['tokens']:10,.0f}{one['batch'] or 0:8,.0f}{one['value']:12.5f}"
            f"{one['loss']:9.4f}   {tried}"
        )
    low, high = law["interval"]
    lines += [
        "",
        f"law of the sizes below {LARGEST:,}, at the largest: {law['value']:.5f}, 95 % [{low:.5f}, {high:.5f}]",
        f"measured there: {best['value']:.5f}, a factor of {ratio:.2f} (at most {WANTED} wanted)",
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(ratio > WANTED)


def trial(work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `scaling rates --json` prints of all sizes, and of the smaller ones with their law at the largest."""
    if not (work / "shards" / "laptop" / "train" / "index.json").exists():
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [one for one in sorted(library.rglob("*.py")) if one.stat().st_size and not SKIPPED & {*one.parts}]
        command(work, "data", "pack", *files, "--out", "shards/laptop", "--tokenizer", "bytes", "--validation", "4%")
    sweep = yaml.safe_load((ROOT / "configs" / "sweeps" / "pair.yaml").read_text())
    sweep |= {"name": "rates", "tokens_per_param": [20], "seeds": [1], "learning_rates": {"factors": FACTORS}}
    (work / "rates.yaml").write_text(yaml.safe_dump(sweep))
    command(work, "sweep", "run", "rates.yaml")
    measured = json.loads(command(work, "scaling", "rates", "runs/rates", "--out", "all", "--json"))
    largest = max(measured["laws"]["lr"]["optima"], key=lambda one: float(one["params"]))
    at = ("--at-params", largest["params"], "--at-tokens", largest["tokens"], "--at-batch", largest["batch"])
    smaller = command(
        work, "scaling", "rates", "runs/rates", "--out", "smaller", "--where", f"params < {LARGEST}", *at, "--json"
    )
    return measured, json.loads(smaller)


def command(work: Path, *arguments: object) -> str:
    """One command of bigtrain in a directory; returns its standard output."""
    words = [sys.executable, "-m", "bigtrain", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=work, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
