from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.optimize import check_grad

from bigtrain.config import UserError
from bigtrain.scaling import law, parametric
from bigtrain.scaling.batched import descend, refit
from bigtrain.scaling.bootstrap import bootstrap, draw_weights
from bigtrain.scaling.document import read_law
from bigtrain.scaling.fit import fit
from bigtrain.scaling.judge import _unused_budgets
from bigtrain.scaling.objective import LOSS_FUNCTIONS, Problem, value, value_and_gradient
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.predict import predict
from bigtrain.scaling.report import write_outputs
from bigtrain.scaling.runs.columns import ColumnNames
from tests.bench.scaling_coverage import Design, measure

WriteRuns = Callable[..., Path]
Rows = list[dict[str, object]]
QUICK = FitOptions(replicates=100, processes=1)


def problem(noise: float = 0.002, function: str = "huber") -> Problem:
    params, tokens, _ = Design(6, "independent").runs()
    generator = np.random.default_rng(3)
    truth = np.array([np.log(482.0), np.log(2085.0), np.log(1.82), 0.348, 0.366])
    losses = law.loss(truth, params, tokens) * np.exp(noise * generator.normal(size=len(params)))
    return Problem.of(params, tokens, losses, function)  # type: ignore[arg-type]


def test_a_law_without_noise_is_recovered() -> None:
    found = law.natural(parametric.fit(problem(noise=0.0), starts=4).theta)
    np.testing.assert_allclose(found, [482.0, 2085.0, 1.82, 0.348, 0.366], rtol=1e-5)


@pytest.mark.parametrize("function", LOSS_FUNCTIONS)
def test_the_gradient_is_that_of_the_objective(function: str) -> None:
    one = problem(function=function)
    at = np.array([-1.0, -0.5, 0.6, 0.4, 0.3])
    error = check_grad(lambda t: value_and_gradient(one, t, 1.0)[0], lambda t: value_and_gradient(one, t, 1.0)[1], at)
    assert error < 1e-4


def test_no_start_finds_a_lower_minimum_than_a_batched_refit() -> None:
    one = problem()
    whole = parametric.fit(one, starts=4)
    weights = draw_weights(np.arange(len(one.ln_n)), 0, np.arange(6))
    ends = refit(one, weights, whole.centred)
    starts = np.random.default_rng(0).uniform([-3, -3, -1, 0.1, 0.1], [1, 1, 1, 1, 1], (40, 5))
    for row, objective in zip(weights, ends.objective, strict=True):
        many = np.tile(row, (len(starts), 1))
        found, lowest, _ = descend(one, many, starts)
        assert lowest.min() >= objective * (1 - 1e-7)
        assert value(one, many, found, one.delta).min() == pytest.approx(lowest.min())
    assert ends.converged.all()


@pytest.mark.slow
def test_the_bootstrap_is_the_same_for_any_number_of_processes() -> None:
    one = problem()
    theta = parametric.fit(one, starts=2).centred
    clusters = np.repeat(np.arange(6), 6)
    alone, two, three = (bootstrap(one, theta, clusters, 7, 300, processes=count).theta for count in (1, 2, 3))
    np.testing.assert_array_equal(alone, two)
    np.testing.assert_array_equal(alone, three)


@pytest.mark.slow
def test_replicates_of_fewer_distinct_runs_than_parameters_are_fitted_too() -> None:
    """Six runs, a cluster each: a replicate that draws three of them has a singular Hessian, but for rounding."""
    params = np.array([1976.0, 3376.0, 1320.0, 3376.0, 6736.0, 3944.0])
    tokens = np.array([5888.0, 6656.0, 13312.0, 20207.0, 13551.0, 19695.0])
    problem = Problem.of(params, tokens, np.array([5.018, 4.446, 4.362, 3.845, 3.946, 4.038]), "huber", 1e-3, False)
    refits = bootstrap(problem, parametric.fit(problem, 0).centred, np.arange(6), replicates=50, processes=1)
    assert np.isfinite(refits.theta).all()


@pytest.mark.slow
def test_equal_exponents_are_equal(write_runs: WriteRuns) -> None:
    options = FitOptions(approach="a3", equal_exponents=True, replicates=100, processes=1)
    one = fit(str(write_runs()), options).law["approaches"]["a3_huber"]
    assert one["alpha"] == pytest.approx(one["beta"], abs=1e-12)


def test_law_and_prediction_hold_the_truth_and_the_page_is_drawn(write_runs: WriteRuns, tmp_path: Path) -> None:
    fitted = fit(str(write_runs()), QUICK)
    files = write_outputs(fitted, tmp_path / "out")
    read = read_law(tmp_path / "out")
    assert read == json.loads(json.dumps(fitted.law))
    assert abs(read["held_out"]["error"]) < 0.01
    assert read["approaches"]["a3_huber"]["search"]["refits_agreed"] == 1.0
    said = predict(read, 1e23, params=1e10)
    low, high = said["optimal"]["loss"]["interval"]
    truth = np.array([np.log(482.0), np.log(2085.0), np.log(1.82), 0.348, 0.366])
    assert low < law.optimal_loss(truth, 1e23) < high
    assert said["chosen"]["flops_price"]["value"] > 1
    # The price is defined by an equal loss: the optimum of the smaller budget reaches what the chosen run does.
    theta = np.array(read["approaches"]["a3_huber"]["theta"])
    equal = law.optimal_loss(theta, 1e23 / said["chosen"]["flops_price"]["value"])
    assert equal == pytest.approx(said["chosen"]["loss"]["value"], rel=1e-9)
    assert 0 < said["next_run"]["interval_width_factor"] < 1
    drawn = ElementTree.parse(files[2]).getroot()
    fills = [one.get("fill") for one in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    assert sum(fill != "none" for fill in fills) >= len(fitted.table)
    assert fills.count("none") == 1
    assert f"error {read['held_out']['error']:+.2%}" in "".join(drawn.itertext())
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium to open the page in")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", files[1].as_uri()],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    charts = done.stdout.count('type="application/json"')
    assert charts >= 7
    assert done.stdout.count('class="main-svg"') >= 2 * charts
    shown = html.unescape(re.sub(r"<[^>]+>", "\n", done.stdout.split("<main>")[1].split("</main>")[0]))
    one = read["approaches"]["a3_huber"]
    for text in (
        f"{read['held_out']['error']:+.2%}",
        f"{one['target']['loss']['value']:.4f}",
        f"{one['A']:.4g}",
        f"{one['objective']:.8g}",
    ):
        assert text in shown, text


def test_prediction_needs_neither_scipy_nor_torch() -> None:
    code = (
        "import sys; import bigtrain.scaling.predict, bigtrain.scaling.document;"
        "assert not {'scipy', 'torch'} & set(sys.modules);"
        "import bigtrain.scaling.fit, bigtrain.scaling.report; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def set_column(name: str, convert: Callable[[float], object]) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for row in rows:
            row[name] = convert(float(str(row[name])))

    return change


def first(**values: object) -> Callable[[Rows], None]:
    return lambda rows: rows[0].update(values)


def without(name: str) -> Callable[[Rows], None]:
    return lambda rows: [row.pop(name) for row in rows] and None


def phases(rows: Rows) -> None:
    for i, row in enumerate(rows):
        row["phase"] = "decayed" if i % 2 else "stable"


BAD: dict[str, tuple[Callable[[Rows], None], str]] = {
    "no loss": (without("loss"), "no column of losses"),
    "no tokens": (without("D"), "two of params, tokens and flops"),
    "D in billions": (set_column("D", lambda d: d / 1e9), "units"),
    "N in millions": (set_column("N", lambda n: n / 1e6), "units"),
    "perplexity": (set_column("loss", lambda x: 100 * x), "nats"),
    "NaN": (first(loss="nan"), "line 2: nothing"),
    "text": (first(N="seven"), "'seven'"),
    "duplicate": (lambda rows: rows.append(dict(rows[3])), "Two rows are the same run"),
    "too few": (lambda rows: rows.__delitem__(slice(4, None)), "parameters"),
    "mixed phases": (phases, "phase"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(write_runs: WriteRuns, name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(UserError, match=re.escape(message)):
        fit(str(write_runs(change=change)), FitOptions(approach="a3", replicates=100))


def test_designs_that_cannot_tell_are_refused(write_runs: WriteRuns) -> None:
    with pytest.raises(UserError, match="D follows from N"):
        fit(str(write_runs(ratios=(20.0,))), FitOptions(approach="a3", replicates=100))
    with pytest.raises(UserError, match="inside the data"):
        fit(str(write_runs()), FitOptions(target_flops=1e18))
    with pytest.raises(UserError, match="Did you mean 'model'"):
        fit(str(write_runs()), FitOptions(columns=ColumnNames(group="modell")))


def isoflops(path: Path, budgets: tuple[float, ...], bend: float = 1.0, shift: float = 0.0) -> Path:
    lines = ["flops,tokens,loss"]
    for budget in budgets:
        best = 0.3 * budget**0.53
        for x in (np.linspace(-1.0, 1.0, 7) + shift).tolist():
            loss = 2.5 - 0.05 * math.log10(budget / 1e18) + 0.02 * bend * x * x
            lines.append(f"{budget!r},{best * math.exp(x)!r},{loss!r}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_isoflop_minima_are_found_and_bad_parabolas_refused(tmp_path: Path) -> None:
    path = tmp_path / "iso.csv"
    only = FitOptions(approach="a2", replicates=100)
    good = (1e18, 1e19, 1e20, 1e21)
    found = fit(str(isoflops(path, good)), only).law["approaches"]["a2"]
    assert (found["b"], found["tokens_coefficient"]) == pytest.approx((0.53, 0.3))
    for budgets, bend, shift, message in (
        (good[:2], 1.0, 0.0, "2 of 2 budgets"), (good, -1.0, 0.0, "opens downward"), (good, 1.0, 1.5, "edge")
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            fit(str(isoflops(path, budgets, bend, shift)), only)


@pytest.mark.slow
def test_outliers_and_few_clusters_are_warned_of(write_runs: WriteRuns) -> None:
    options = FitOptions(approach="a3", cluster="model", replicates=100, processes=1)
    warnings = " ".join(fit(str(write_runs(sizes=6, change=first(loss=9.0))), options).law["warnings"])
    assert "1 outliers" in warnings
    assert "6 clusters" in warnings


@pytest.mark.slow
def test_intervals_hold_the_truth_and_single_points_fail_under_trunk_noise() -> None:
    """The study in small: `python -m tests.bench.scaling_coverage` has 200 draws of four designs."""
    model, none = measure(Design(12, "trunk"), draws=30, replicates=100)
    assert (model.held >= 0.8).all(), model.held
    assert none.held[2] < 0.8, none.held


def test_refused_budgets_are_one_warning_a_reason() -> None:
    budgets = [{"flops": 10.0**k, "refused": "it opens downward" if k % 2 else "too few runs"} for k in range(18, 33)]
    found = _unused_budgets("a2", [*budgets, {"flops": 1e9, "refused": None}])
    assert len(found) == 2
    assert found[0].startswith("a2: 8 budgets (1e+18, 1e+20")
    assert "and 3 more" in found[0]
