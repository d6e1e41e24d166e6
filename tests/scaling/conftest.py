"""Runs of a known law as files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bigtrain.scaling import law

TRUTH = np.array([np.log(482.0), np.log(2085.0), np.log(1.82), 0.348, 0.366])


@pytest.fixture
def write_runs(tmp_path: Path) -> Callable[..., Path]:
    """Writes a grid of sizes and D/N with 0.2 % noise to a CSV; `change` may spoil its rows."""

    def write(
        sizes: int = 9, ratios: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0, 80.0), noise: float = 0.002,
        change: Callable[[list[dict[str, object]]], None] | None = None,
    ) -> Path:  # fmt: skip
        generator = np.random.default_rng(0)
        params = np.repeat(np.geomspace(2e7, 1e9, sizes), len(ratios))
        tokens = params * np.tile(ratios, sizes)
        losses = law.loss(TRUTH, params, tokens) * np.exp(noise * generator.normal(size=len(params)))
        rows: list[dict[str, object]] = [
            {"run": f"r{i}", "model": f"m{i // len(ratios)}", "N": n, "D": d, "loss": value}
            for i, (n, d, value) in enumerate(zip(params.tolist(), tokens.tolist(), losses.tolist(), strict=True))
        ]
        if change is not None:
            change(rows)
        path = tmp_path / "runs.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write
