"""Accuracies of tasks from a ladder, and laws of the frontier."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bigtrain.scaling import law
from bigtrain.scaling.frontier import fit_frontier, frontier_document
from bigtrain.scaling.tasks import guess_tasks, sigmoid

Command = Callable[..., subprocess.CompletedProcess[str]]
PUBLISHED = {"hellaswag_val": (0.8530, 0.8319), "piqa_val": (0.8208, 0.8296), "csqa_val": (0.7761, 0.7410)}
"""Accuracy of OLMo 2's 13B model: predicted by Bhagia et al. 2024, and measured."""
TARGET = ("--at-params", "13202396160", "--at-tokens", "5000088518656")


@pytest.mark.slow
def test_olmo_tasks_as_published_and_as_measured(bigtrain: Command, real_data: Path) -> None:
    source = real_data / "scaling/olmo_ladder_tasks/olmo_ladder_tasks.csv"
    done = bigtrain("scaling", "tasks", source, *TARGET, "--where", "role == ladder", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["task"]: one["accuracy"] for one in json.loads(done.stdout)["tasks"]}
    held = []
    for name, (predicted, measured) in PUBLISHED.items():
        assert found[name]["value"] == pytest.approx(predicted, abs=0.01)
        low, high = found[name]["interval"]
        held.append(low <= measured <= high)
    assert sum(held) >= 2


def test_a_planted_chain_is_recovered(bigtrain: Command, tmp_path: Path) -> None:
    truth = np.array([np.log(20.0), np.log(60.0), np.log(0.5), 0.25, 0.25])
    curve = np.array([-0.7, 0.9, 8.0, 1.0])
    generator = np.random.default_rng(0)
    lines = ["run,params,tokens,arc/bpb,arc/accuracy"]
    for n in np.geomspace(2e8, 2e9, 5).tolist():
        for ratio in (20, 60, 180):
            for share in np.linspace(0.1, 1.0, 20).tolist():
                d = n * ratio * share
                loss = float(law.loss(truth, n, d))
                accuracy = float(sigmoid(curve, loss)) + 0.002 * generator.normal()
                lines.append(f"{n:.3g}x{ratio},{n!r},{d!r},{loss!r},{accuracy!r}")
    path = tmp_path / "ladder.csv"
    path.write_text("\n".join(lines) + "\n")
    done = bigtrain("scaling", "tasks", path, "--at-params", "10B", "--at-tokens", "1T", "--json", "--out", "t")
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = json.loads(done.stdout)["tasks"]
    wanted = float(sigmoid(curve, float(law.loss(truth, 1e10, 1e12))))
    assert one["accuracy"]["value"] == pytest.approx(wanted, abs=0.03)
    low, high = one["accuracy"]["interval"]
    assert low <= wanted <= high
    wrong = bigtrain("scaling", "tasks", path, "--at-params", "10B", "--at-tokens", "1T", "--task", "arc=bpb:acc")
    assert wrong.returncode == 2


def test_tasks_are_guessed_by_pairs_of_columns() -> None:
    found = guess_tasks(["run", "piqa/loss", "piqa/acc", "arc_bpb", "arc_accuracy", "boolq_accuracy"])
    assert [(one.name, one.loss) for one in found] == [("piqa", "piqa/loss"), ("arc", "arc_bpb")]


def test_a_frontier_law_without_noise_is_recovered_and_back_tested() -> None:
    flops = np.geomspace(1e18, 1e22, 9)
    losses = 1.7 + 0.9 * (flops / 1e20) ** -0.12
    found = fit_frontier(flops, losses[None], 1e20)
    assert (found.floor[0], found.exponent[0]) == pytest.approx((1.7, 0.12), rel=0.02)
    document = frontier_document(flops, losses, np.empty((0, 9)), 1e23, seed=0)
    assert document is not None
    assert [round(test["factor"]) for test in document["back_tests"]] == [3, 10, 32]
    assert max(abs(test["error"]) for test in document["back_tests"]) < 1e-3
