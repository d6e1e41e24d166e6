"""Laws of the user's own form: parsing, derivatives, fits, intervals, and repeated data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.scaling import law, parametric
from bigtrain.scaling.fit import fit
from bigtrain.scaling.form_fit import _linear_constants, data_of, fit_form
from bigtrain.scaling.forms import NAMED, Form
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.predict import predict
from bigtrain.scaling.report import write_outputs
from bigtrain.scaling.runs.readers import read_source
from bigtrain.scaling.runs.table import RunTable
from tests.scaling.conftest import TRUTH

WriteRuns = Callable[..., Path]
QUICK = FitOptions(approach="a3", loss_function="huber", replicates=100, processes=1, starts=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("E + __import__('os').getcwd()", "does not allow"), ("E + A.real / N", "does not allow"),
        ("[N for N in (1,)]", "does not allow"), ("E + A / N**", "cannot parse"), ("1 + 2", "no N or D"),
        ("N / D", "no constant"), ("E + exp(N, D)", "takes 1"), ("E if N else D", "does not allow"),
        ("E + tan(N)", "does not allow"), ("E + True * N", "does not allow"),
    ],
)  # fmt: skip
def test_what_is_no_formula_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Form.parse(text)


def test_derivatives_are_those_of_the_value() -> None:
    form = Form.parse(
        "E + max(A / N**alpha, 0.01) - g * log(D / U) + sqrt(B) / (U + U * R * (1 - exp(-D / U / R)))^beta"
    )
    generator = np.random.default_rng(0)
    data = {"N": np.array([1e3, 1e4]), "D": np.array([1e4, 3e5]), "U": np.array([5e3, 9e3])}
    at = generator.uniform(-0.5, 0.5, (1, len(form.constants)))
    _, slope = form.value(at, data)
    for i in range(len(form.constants)):
        step = np.zeros_like(at)
        step[0, i] = 1e-6
        measured = (form.value(at + step, data)[0] - form.value(at - step, data)[0]) / 2e-6
        np.testing.assert_allclose(slope[i], measured, rtol=1e-5, atol=1e-9)


def test_constants_in_which_a_form_is_linear_are_found() -> None:
    form = Form.parse(NAMED["repeats"])
    data = {"N": np.array([1e7, 1e8]), "D": np.array([1e9, 4e9]), "U": np.array([5e8, 4e9])}
    assert _linear_constants(form, data, np.random.default_rng(0)) == ["E", "A", "B"]


def test_the_usual_law_as_an_own_form_is_approach_3(write_runs: WriteRuns) -> None:
    table = read_source(str(write_runs()))
    found = fit_form(Form.parse(NAMED["chinchilla"]), table)
    usual = parametric.fit(Problem.of(table.params, table.tokens, table.loss), starts=4)
    assert found.objective == pytest.approx(usual.objective, rel=1e-4)
    named = dict(zip(found.form.constants, np.exp(found.logs), strict=True))
    for name, value in zip(law.NAMES, law.natural(usual.theta), strict=True):
        assert named[name] == pytest.approx(value, rel=0.02)


def repeated(repeats: float = 15.0, noise: float = 0.001) -> RunTable:
    """Runs of up to 32 epochs whose repeated tokens teach as Muennighoff et al. found."""
    generator = np.random.default_rng(1)
    params = np.repeat(np.geomspace(2e7, 6e8, 6), 8)
    unique = np.tile(np.repeat([2e9, 8e8], 4), 6)
    tokens = unique * np.tile([1.0, 4.0, 12.0, 32.0], 12)
    learned = unique + unique * repeats * (1 - np.exp(-(tokens / unique - 1) / repeats))
    loss = law.loss(TRUTH, params, learned) * np.exp(noise * generator.normal(size=len(params)))
    names = tuple(f"r{i}" for i in range(len(params)))
    return RunTable(names, names, params, tokens, 6 * params * tokens, loss, unique_tokens=unique, place=names)


def test_repeated_data_are_fitted_by_their_own_form_and_not_by_the_plain_one() -> None:
    table = repeated()
    found = fit_form(Form.parse("repeats"), table)
    named = dict(zip(found.form.constants, np.exp(found.logs), strict=True))
    assert named["R"] == pytest.approx(15.0, rel=0.15)
    assert named["beta"] == pytest.approx(TRUTH[4], abs=0.04)
    plain = parametric.fit(Problem.of(table.params, table.tokens, table.loss), starts=2)
    assert plain.objective > 3 * found.objective
    with pytest.raises(UserError, match="unique tokens"):
        data_of(found.form, replace(table, unique_tokens=None))


@pytest.fixture(scope="module")
def own_law(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """law.json of the form "repeats", and where its page is."""
    path = tmp_path_factory.mktemp("repeats")
    table = repeated()
    columns = {"run": list(table.run), "N": table.params.tolist(), "D": table.tokens.tolist(),
               "loss": table.loss.tolist(), "unique_tokens": list(table.unique_tokens)}  # type: ignore[arg-type]  # fmt: skip
    options = replace(QUICK, form="repeats")
    fitted = fit(columns, options)
    write_outputs(fitted, path)
    return {"law": json.loads((path / "law.json").read_text()), "page": (path / "law.html").read_text()}


def test_a_law_of_an_own_form_has_intervals_a_back_test_a_page_and_predicts(own_law: dict[str, object]) -> None:
    document = own_law["law"]
    assert isinstance(document, dict)
    one = document["approaches"]["form"]
    low, high = one["interval"]["R"]
    assert low < 15.0 < high < 4 * low
    assert document["primary"] == "form"
    assert abs(document["held_out"]["error"]) < 0.01
    assert not any("takes all tokens as fresh" in text for text in document["warnings"])
    assert NAMED["repeats"].replace("**", "**") in str(own_law["page"])
    at = predict(document, params=2e8, tokens=6.4e10)["chosen"]["loss"]
    learned = 2e9 + 2e9 * 15 * (1 - np.exp(-31 / 15))
    truth = float(law.loss(TRUTH, 2e8, learned))
    assert at["value"] == pytest.approx(truth, rel=2e-3)
    assert at["interval"][0] < truth < at["interval"][1]


@pytest.mark.slow
def test_the_plain_law_warns_of_many_epochs() -> None:
    table = repeated()
    columns = {"N": table.params, "D": table.tokens, "loss": table.loss, "unique_tokens": table.unique_tokens}
    warnings = fit({name: list(values) for name, values in columns.items()}, QUICK).law["warnings"]  # type: ignore[arg-type]
    assert any("32.0 times" in text and "--form repeats" in text for text in warnings)
