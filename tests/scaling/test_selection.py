"""Which rows are fitted, which are refused, and which are named and kept."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.scaling import law
from bigtrain.scaling.fit import fit, prepare
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.columns import ColumnNames
from bigtrain.scaling.runs.numbers import count, parse_number
from bigtrain.scaling.runs.readers import read_source
from bigtrain.scaling.runs.where import where

WriteRuns = Callable[..., Path]
Rows = list[dict[str, object]]
A3 = FitOptions(approach="a3", loss_function="huber", replicates=100, processes=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [("125M", 1.25e8), ("7b", 7e9), ("1.4T", 1.4e12), ("1_000", 1e3), ("3e21", 3e21), ("1,300", 1300.0)],
)
def test_numbers_carry_suffixes(text: str, value: float) -> None:
    assert parse_number(text) == value


def test_words_are_no_numbers_and_counts_have_one_notation() -> None:
    assert parse_number("NA") is None
    # A decimal comma, which is not one of thousands.
    assert [parse_number(text) for text in ("3,45", "1,3000", "1234,567")] == [None, None, None]
    assert math.isnan(parse_number("") or 0.0)
    assert [count(value) for value in (16.24e9, 7e6, 1e21, 12.0)] == ["16.2B", "7M", "1e+21", "12"]


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("tokens / params > 30", lambda n, d: d / n > 30),
        ("params < 30M or params > 500M", lambda n, d: n < 3e7 or n > 5e8),
        ("(params < 30M OR params > 500M) AND tokens / params < 6", lambda n, d: (n < 3e7 or n > 5e8) and d / n < 6),
        ("params < 30M && tokens > 0 || model == m8", lambda n, d: n < 3e7 or n > 9e8),
        ("not (params < 30M)", lambda n, d: n >= 3e7),
        ("20M < params < 1e8", lambda n, d: 2e7 < n < 1e8),
        (".5 * tokens / params > +15", lambda n, d: d / n > 30),
    ],
)
def test_where_has_and_or_not_and_ratios(write_runs: WriteRuns, expression: str, kept: Callable[..., bool]) -> None:
    table = read_source(str(write_runs()))
    found = where(table, expression)
    wanted = [i for i in range(len(table)) if kept(table.params[i], table.tokens[i])]
    assert [table.run[i] for i in wanted] == list(found.run)
    assert 0 < len(found) < len(table)


@pytest.mark.parametrize(
    "expression", ["model == m99", "params <", "5 > 3", "params < 3 andd tokens > 1", "lss > 3", "(N > 3"]
)
def test_where_refuses_what_it_cannot_mean(write_runs: WriteRuns, expression: str) -> None:
    with pytest.raises(UserError):
        where(read_source(str(write_runs())), expression)


@pytest.mark.parametrize(
    ("expression", "kept", "dropped"),
    [
        ("lr < 2e-3", "a", 3),
        ("not lr < 2e-3", "b", 3),
        ("lr != 1e-3", "b", 3),
        ("not (lr < 2e-3 and params > 0)", "b", 3),
        ("lr < 2e-3 or params > 0", "abcde", 0),
        ("not (lr >= 0 or params < 0)", "", 3),
        ("lr / lr == 1", "ab", 3),
        ('lr == ""', "ce", 0),
        ("state != finished", "c", 1),
        ("not state == finished", "c", 1),
        ('state == ""', "e", 0),
    ],
)
def test_a_row_without_the_value_satisfies_neither_a_comparison_nor_its_negation(
    tmp_path: Path, expression: str, kept: str, dropped: int
) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(
        "run,N,D,loss,lr,state\na,1e8,2e9,3.1,1e-3,finished\nb,2e8,4e9,3.0,3e-3,finished\n"
        "c,3e8,6e9,2.9,,crashed\nd,4e8,8e9,2.8,n/a,finished\ne,5e8,9e9,2.7,,\n"
    )
    read = read_source(str(file))
    found = where(read, expression)
    assert "".join(found.run) == kept
    more = [note for note in found.notes if note not in read.notes]
    name = "state" if "state" in expression else "lr"
    assert more == ([f"--where drops {dropped} rows that have no value of: {name}"] if dropped else [])


def test_a_fit_says_which_rows_it_dropped_for_want_of_a_value(write_runs: WriteRuns) -> None:
    def change(rows: Rows) -> None:
        for number, row in enumerate(rows):
            row["width"] = "" if number == 11 else 64

    read, used, _ = prepare(str(write_runs(change=change)), replace(A3, where="not width > 100"))
    assert len(used) == 44
    assert "--where drops 1 rows that have no value of: width" in read.notes


def scaled(**factors: float) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for row in rows:
            for name, factor in factors.items():
                row[name] = float(str(row[name])) * factor

    return change


@pytest.mark.parametrize("factors", [{"N": 1e-6, "D": 1e-6}, {"N": 1e-6, "D": 1e-9}, {"N": 1e-9}, {"D": 1e-6}])
def test_a_column_in_other_units_is_refused_and_the_advice_works(
    write_runs: WriteRuns, factors: dict[str, float]
) -> None:
    path = str(write_runs(change=scaled(**factors)))
    with pytest.raises(UserError, match="units"):
        prepare(path, A3)
    units = {"params_unit": 1 / factors.get("N", 1.0), "tokens_unit": 1 / factors.get("D", 1.0)}
    _, table, _ = prepare(path, replace(A3, columns=ColumnNames(**units)))  # type: ignore[arg-type]
    assert table.params.max() == pytest.approx(1e9)
    assert table.tokens.max() == pytest.approx(8e10)


def test_one_odd_row_is_named_and_fitted(write_runs: WriteRuns) -> None:
    path = str(write_runs(change=lambda rows: rows[3].update(D=1e5)))
    _, table, warnings = prepare(path, A3)
    assert len(table) == 45
    assert any("line 5" in text and "tokens a parameter" in text for text in warnings)


def repeated(**values: object) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for row in list(rows[:2]):
            row.update(dict.fromkeys(values, "1"))
            rows.append({**row, "run": f"{row['run']}again", **values})
        for row in rows:
            for name in values:
                row.setdefault(name, "1")

    return change


def test_copies_are_all_named_and_dropped_on_request(write_runs: WriteRuns) -> None:
    path = str(write_runs(change=repeated()))
    with pytest.raises(UserError, match=r"line 2 and line 47.*line 3 and line 48"):
        prepare(path, A3)
    assert len(prepare(path, replace(A3, duplicates="drop"))[1]) == 45
    assert len(prepare(path, replace(A3, duplicates="keep"))[1]) == 47


@pytest.mark.parametrize("name", ["seed", "dropout"])
def test_rows_that_differ_in_a_setting_are_no_copies(write_runs: WriteRuns, name: str) -> None:
    assert len(prepare(str(write_runs(change=repeated(**{name: "2"}))), A3)[1]) == 47


def swept(best: int) -> Callable[[Rows], None]:
    """Each (N, D) at five learning rates, of which number `best` is the lowest."""

    def change(rows: Rows) -> None:
        for row in list(rows):
            rows.remove(row)
            for i in range(5):
                loss = float(str(row["loss"])) + 0.02 * (i - best) ** 2
                rows.append({**row, "run": f"{row['run']}-{i}", "loss": loss, "learning_rate": 1e-3 * 2.0**i})

    return change


def test_the_best_learning_rate_of_each_point_is_fitted(write_runs: WriteRuns) -> None:
    path = str(write_runs(change=swept(best=2)))
    read, table, _ = prepare(path, A3)
    assert len(table) == 45
    assert set(table.lr) == {4e-3}  # type: ignore[arg-type]
    assert any("the best of each (N, D)" in note for note in read.notes)
    assert len(prepare(path, replace(A3, swept="all"))[1]) == 225


def test_a_best_at_the_edge_of_its_grid_is_refused(write_runs: WriteRuns) -> None:
    path = str(write_runs(change=swept(best=4)))
    with pytest.raises(UserError, match="edge of its grid in 45 of 45"):
        prepare(path, A3)
    assert len(prepare(path, replace(A3, edges="keep"))[1]) == 45
    with pytest.raises(UserError, match="No pair"):
        prepare(path, replace(A3, edges="drop"))


def test_text_for_a_loss_is_refused_only_where_its_row_is_fitted(write_runs: WriteRuns) -> None:
    def change(rows: Rows) -> None:
        for row in rows:
            row["state"] = "finished"
        rows[7].update(loss="diverged", state="crashed")

    path = str(write_runs(change=change))
    with pytest.raises(UserError, match="line 9: 'diverged' in column 'loss'") as refused:
        prepare(path, A3)
    assert '--where "loss > 0"' in (refused.value.fix or "")
    for expression in ("state == finished", "loss > 0"):
        assert len(prepare(path, replace(A3, where=expression))[1]) == 44


@pytest.mark.parametrize("loss", ["inf", "-1", "0", "NA"])
def test_the_advice_for_a_loss_that_cannot_be_is_an_expression_that_drops_its_row(
    write_runs: WriteRuns, loss: str
) -> None:
    path = str(write_runs(change=lambda rows: rows[7].update(loss=loss)))
    with pytest.raises(UserError) as caught:
        prepare(path, A3)
    expression = (caught.value.fix or "").partition("--where ")[2].strip('"')
    assert len(prepare(path, replace(A3, where=expression))[1]) == 44


def test_the_advice_for_mixed_phases_holds_for_a_name_of_two_words(write_runs: WriteRuns) -> None:
    def change(rows: Rows) -> None:
        for number, row in enumerate(rows):
            row["phase"] = "after decay" if number % 3 else "stable"

    path = str(write_runs(change=change))
    with pytest.raises(UserError, match="several phases") as caught:
        prepare(path, A3)
    expression = (caught.value.fix or "").partition("--where ")[2].strip("'")
    assert 0 < len(prepare(path, replace(A3, where=expression))[1]) < 45


def test_a_column_with_decimal_commas_is_refused(write_runs: WriteRuns) -> None:
    def change(rows: Rows) -> None:
        for row in rows:
            row["loss"] = f"{float(str(row['loss'])):.2f}".replace(".", ",")

    with pytest.raises(UserError, match="not a number") as caught:
        prepare(str(write_runs(change=change)), A3)
    assert "3.45" in (caught.value.fix or "")


@pytest.mark.slow
def test_a_column_that_does_not_tell_models_apart_is_not_the_cluster(write_runs: WriteRuns) -> None:
    def change(rows: Rows) -> None:
        for row in rows:
            row["model"] = "llama"

    fitted = fit(str(write_runs(change=change)), replace(A3, cluster="model"))
    assert fitted.law["data"]["models"] == 9
    low, high = fitted.law["approaches"]["a3_huber"]["interval"]["alpha"]
    assert high > low


@pytest.mark.slow
def test_three_models_have_intervals_of_some_width(write_runs: WriteRuns) -> None:
    fitted = fit(str(write_runs(sizes=3)), A3)
    low, high = fitted.law["approaches"]["a3_huber"]["interval"]["alpha"]
    assert high - low > 1e-3


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (("eval/c4/loss", "aux_loss"), "eval/c4/loss"), (("smooth loss",), "smooth loss"),
        (("train_loss", "loss_validation"), "loss_validation"), (("total_params", "active_params"), "active_params"),
    ],
)  # fmt: skip
def test_columns_are_guessed_by_what_they_mean(tmp_path: Path, columns: tuple[str, ...], chosen: str) -> None:
    path = tmp_path / "runs.csv"
    losses = [name for name in columns if "loss" in name] or ["loss"]
    sizes = [name for name in columns if "params" in name] or ["params"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*sizes, "tokens", *losses])
        for i in range(4):
            counts = [f"{(i + 1) * (k + 1)}M" for k in range(len(sizes))]
            writer.writerow([*counts, "1B", *[3.0 + k for k in range(len(losses))]])
    table = read_source(str(path))
    values = table.loss if chosen in losses else table.params
    column = losses.index(chosen) if chosen in losses else sizes.index(chosen)
    assert values[0] == (3.0 + column if chosen in losses else 1e6 * (column + 1))


@pytest.mark.parametrize(
    ("names", "values", "tokens"),
    [
        (("N (M)", "D (B)"), ("20", "1.5"), 1.5e9), (("params_B", "tokens_T"), ("0.02", "0.0015"), 1.5e9),
        (("Params [G]", "Tokens [G]"), ("0.02", "1.5"), 1.5e9), (("model size", "tokens_B"), ("20M", "1.5B"), 1.5e9),
        (("params", "EFLOPs"), ("20M", "0.18"), 1.5e9), (("params", "pf_days"), ("2e7", "0.00208333"), 1.5e9),
        (("params", "tokens_per_param"), ("2e7", "75"), 1.5e9),
        (("params_non_embedding", "D"), ("2e7", "1.5e9"), 1.5e9),
    ],
)  # fmt: skip
def test_units_in_the_names_of_columns_are_taken(
    names: tuple[str, str], values: tuple[str, str], tokens: float
) -> None:
    table = read_source({names[0]: [values[0]] * 3, names[1]: [values[1]] * 3, "loss": [3.0, 2.9, 2.8]})
    assert table.params[0] == pytest.approx(2e7)
    assert table.tokens[0] == pytest.approx(tokens, rel=1e-4)


def test_files_with_semicolons_and_arrays_of_objects_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("N;D;loss\n2e7;1e9;3.1\n4e7;1e9;3.0\n")
    (tmp_path / "b.json").write_text('[{"N": 2e7, "D": 1e9, "loss": 3.1}, {"N": 4e7, "D": 1e9, "loss": 3.0}]')
    for name in ("a.csv", "b.json"):
        assert read_source(str(tmp_path / name)).params.tolist() == [2e7, 4e7]
    (tmp_path / "c.csv").write_text("N;D;loss\n2e7;1e9;3,1\n4e7;1.5e9;3.0\n")
    assert "'3,1' in column 'loss'" in read_source(str(tmp_path / "c.csv")).bad[0]


@pytest.mark.parametrize(("name", "note", "loss"), [("ppl", "logarithm", np.log(20.0)), ("val_bpb", "bits per", 20.0)])
def test_perplexities_or_bits_are_the_loss_of_a_table_without_another(name: str, note: str, loss: float) -> None:
    table = read_source({"N": [1e7], "D": [1e9], name: [20.0]})
    assert table.loss.tolist() == [loss]
    assert any(note in text for text in table.notes)
    assert read_source({"N": [1e7], "D": [1e9], name: [20.0], "loss": [3.0]}).loss.tolist() == [3.0]


def grid(tmp_path: Path, run: Callable[[int, int], str]) -> str:
    """Sizes by token counts without noise; `run` names each row."""
    path = tmp_path / "grid.csv"
    truth = np.array([np.log(482.0), np.log(2085.0), np.log(1.82), 0.348, 0.366])
    lines = ["run,N,D,loss"]
    for i, n in enumerate(np.geomspace(2e7, 1e9, 8).tolist()):
        for k, d in enumerate(np.geomspace(2e8, 8e10, 8).tolist()):
            lines.append(f"{run(i, k)},{n!r},{d!r},{float(law.loss(truth, n, d))!r}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_envelope_needs_curves_within_runs(tmp_path: Path) -> None:
    only = FitOptions(approach="a1", replicates=100)
    with pytest.raises(UserError, match="finished runs"):
        fit(grid(tmp_path, lambda i, k: f"r{i}-{k}"), only)
    found: dict[str, Any] = fit(grid(tmp_path, lambda i, k: f"r{i}"), only).law["approaches"]["a1"]
    assert found["a"] == pytest.approx(0.5126, abs=0.1)
