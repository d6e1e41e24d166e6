"""Tables as papers publish them: each is read as what it says, or refused with the row and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.scaling import law
from bigtrain.scaling.decide import compare_recipes
from bigtrain.scaling.fit import fit, prepare
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.columns import ColumnNames
from bigtrain.scaling.runs.headers import columns_for, unit_of
from bigtrain.scaling.runs.readers import read_source
from bigtrain.scaling.tasks import Task
from bigtrain.scaling.tasks import ladder as task_ladder
from tests.bench.scaling_compare import ladder
from tests.in_process import run_here
from tests.scaling.conftest import TRUTH

SIZES, RATIOS = np.geomspace(2e7, 1e9, 5), (5.0, 10.0, 20.0, 40.0, 80.0)
N = np.repeat(SIZES, len(RATIOS))
D = N * np.tile(RATIOS, len(SIZES))
L = law.loss(TRUTH, N, D)
Row = Callable[[float, float, float], str]

TABLES: dict[str, tuple[str, Row]] = {
    "units.csv": ("Model,Params (M),FLOPs (1e18),val_loss",
                  lambda n, d, x: f"a,{n / 1e6:.8g},{6 * n * d / 1e18:.8g},{x:.6f}"),
    "powers.csv": ("N,C (10^18 FLOPs),loss", lambda n, d, x: f"{n:.8g},{6 * n * d / 1e18:.8g},{x:.6f}"),
    "superscript.csv": ("N,FLOPs (×10¹⁸),loss", lambda n, d, x: f"{n:.8g},{6 * n * d / 1e18:.8g},{x:.6f}"),
    "pf-days.csv": ("Params,Compute (PF-days),Loss", lambda n, d, x: f"{n:.8g},{6 * n * d / 8.64e19:.8g},{x:.6f}"),
    "log10.csv": ("Params,log10 FLOPs,Loss", lambda n, d, x: f"{n:.8g},{math.log10(6 * n * d):.10f},{x:.6f}"),
    "german.csv": ("params;tokens;loss",
                   lambda n, d, x: f"{n:,.0f};{d:,.0f}".replace(",", ".") + f";{x:.6f}".replace(".", ",")),
    "tabs.csv": ("Parameters, total\tTokens, total\tLoss, validation", lambda n, d, x: f"{n:,.0f}\t{d:,.0f}\t{x:.6f}"),
    "tabs.txt": ("N (non-embedding)\tD\tFinal loss", lambda n, d, x: f"{n:,.0f}\t{d:,.0f}\t{x:.6f}"),
    "comment.csv": ("# Table 7\n#Params,#Tokens,Loss", lambda n, d, x: f"{n:.8g},{d:.8g},{x:.6f}"),
    "empty-rows.csv": ("params , tokens , loss ,", lambda n, d, x: f"{n:.8g},{d:.8g},{x:.6f},\n,,,"),
    "moe.csv": ("Total Params (B),Activated Params (M),Training Tokens (B),Validation Loss",
                lambda n, d, x: f"{8 * n / 1e9:.8g},{n / 1e6:.8g},{d / 1e9:.8g},{x:.6f}"),
    "moe-brackets.csv": ("Params (total),Params (active),Tokens,loss",
                         lambda n, d, x: f"{8 * n:.8g},{n:.8g},{d:.8g},{x:.6f}"),
    "moe-short.csv": ("N_total,N_active,D,loss", lambda n, d, x: f"{8 * n:.8g},{n:.8g},{d:.8g},{x:.6f}"),
    "perplexity.csv": ("params,tokens,val_ppl", lambda n, d, x: f"{n:.8g},{d:.8g},{math.exp(x):.6f}"),
    "bits.csv": ("params,tokens,val loss (bits)", lambda n, d, x: f"{n:.8g},{d:.8g},{x / math.log(2):.7f}"),
    "cells.csv": ("N,D,loss", lambda n, d, x: f"{n / 1e6:.8g}M params,{d / 1e9:.8g} billion,{x:.6f} ± 0.004"),
    "times.csv": ("N,D,loss", lambda n, d, x: f"{n / 1e6:.8g}×10^6,{d / 1e9:.8g} x 10^9,{x:.6f}"),
    "ratio.csv": ("size,tokens/param,nll", lambda n, d, x: f"{n / 1e6:.8g}M,{d / n:.8g},{x:.6f}"),
    "words.csv": ("Model Parameters,Dataset size (tokens),Test cross-entropy",
                  lambda n, d, x: f"{n:.8g},{d:.8g},{x:.6f}"),
    "millions.csv": ("Non-Embedding Params (M),tokens_in_billions,Loss (nats/token)",
                     lambda n, d, x: f"{n / 1e6:.8g},{d / 1e9:.8g},{x:.6f}"),
    "throughput.csv": ("params,tokens,TFLOPs,MFU,tokens per second,loss",
                       lambda n, d, x: f"{n:.8g},{d:.8g},153,0.41,1e5,{x:.6f}"),
}  # fmt: skip


def write(path: Path, header: str, row: Row) -> str:
    path.write_text("\n".join([header, *(row(*one) for one in zip(N, D, L, strict=True))]) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", TABLES)
def test_a_published_table_is_read_as_what_it_says(tmp_path: Path, name: str) -> None:
    _, table, warnings = prepare(write(tmp_path / name, *TABLES[name]), FitOptions())
    order = np.argsort(N * D, kind="stable")
    for own, truth, rel in ((table.params, N, 1e-4), (table.tokens, D, 1e-4), (table.loss, L, 1e-5)):
        np.testing.assert_allclose(np.sort(own), np.sort(truth[order]), rtol=rel)
    assert warnings == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["units.csv", "german.csv", "moe.csv", "perplexity.csv"])
def test_the_interval_of_a_published_table_holds_the_truth(tmp_path: Path, name: str) -> None:
    header, row = TABLES[name]
    noise = iter(np.exp(0.002 * np.random.default_rng(1).normal(size=len(L))).tolist())
    path = write(tmp_path / name, header, lambda n, d, x: row(n, d, x * next(noise)))
    options = FitOptions(approach="a3", loss_function="huber", replicates=200, processes=1, starts=2)
    found = fit(path, options).law
    low, high = found["approaches"]["a3_huber"]["target"]["loss"]["interval"]
    assert low <= law.optimal_loss(TRUTH, found["target_flops"]) <= high


def test_json_of_columns_is_read(tmp_path: Path) -> None:
    columns = {"params": N.tolist(), "tokens": D.tolist(), "loss": L.tolist()}
    (tmp_path / "a.json").write_text(json.dumps(columns, indent=1))
    by_row = {name: {str(i): value for i, value in enumerate(column)} for name, column in columns.items()}
    (tmp_path / "b.json").write_text(json.dumps(by_row))
    for name in ("a.json", "b.json"):
        assert len(prepare(str(tmp_path / name), FitOptions())[1]) == len(N)


@pytest.mark.parametrize(
    ("header", "row", "what", "fix"),
    [
        ("params   tokens   loss", lambda n, d, x: f"{n:.0f}   {d:.0f}   {x}", "one column", "commas, semicolons"),
        ("a,b,loss,loss", lambda n, d, x: f"{n},{d},{x},{x}", "the name 'loss'", "Rename"),
        ("params,tokens,loss", lambda n, d, x: f"{n},{d},{math.exp(x)}", "Losses above 14", "val_ppl"),
        ("params,tokens,loss", lambda n, d, x: f"{n:,.0f},{d},{x}", "line 2", "quote cells"),
        ("P,T,loss", lambda n, d, x: f"{n},{d},{x}", "no columns of params and tokens", "--params and --tokens"),
        ("params,tokens,loss", lambda n, d, x: f"{n},{d},{'diverged' if x > 4.9 else x}", "line 2", "loss > 0"),
        ("params,Chinchilla,loss", lambda n, d, x: f"{n},{d / n / 20}xC,{x}", "no columns of tokens", "--tokens"),
    ],
)  # fmt: skip
def test_a_table_that_says_too_little_is_refused_with_advice(
    tmp_path: Path, header: str, row: Row, what: str, fix: str
) -> None:
    with pytest.raises(UserError) as refused:
        prepare(write(tmp_path / "a.csv", header, row), FitOptions())
    assert what in f"{refused.value.what} {refused.value.where}"
    assert fix in (refused.value.fix or "")


@pytest.mark.parametrize(
    "name", ["base_lr", "lr_peak", "eta", "max_learning_rate", "Learning rate (1e-3)", "matrix_lr"]
)
def test_learning_rates_of_other_names_are_recognised(name: str) -> None:
    assert columns_for("lr", ["params", "lr_min", name]) == [name]


@pytest.mark.parametrize("name", ["bsz", "gbs", "Batch Size (M tokens)", "tokens per batch", "global batch"])
def test_batches_of_other_names_are_recognised(name: str) -> None:
    assert columns_for("batch", ["micro_batch", name]) == [name]
    assert unit_of("batch", name) == (1e6 if "(M" in name else 1.0)


def test_a_swept_setting_of_an_unknown_name_is_warned_of(tmp_path: Path) -> None:
    lines = ["params,tokens,rho,accuracy,loss"]
    for n, d, x in zip(N.tolist(), D.tolist(), L.tolist(), strict=True):
        lines += [f"{n},{d},{rho},{x + rho},{x + 0.03 * (rho - 2) ** 2}" for rho in (1, 2, 3)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n")
    _, table, warnings = prepare(str(path), FitOptions())
    assert len(table) == 3 * len(N)
    assert len(warnings) == 1
    assert "differ in 'rho'" in warnings[0]
    _, table, warnings = prepare(str(path), FitOptions(ColumnNames(lr="rho")))
    assert (len(table), warnings) == (len(N), [])


@pytest.mark.parametrize("above", [0.0, 0.03])
def test_rows_before_the_decay_of_the_learning_rate_are_warned_of(tmp_path: Path, above: float) -> None:
    lines = ["run,params,step,tokens,loss"]
    for number, (n, d) in enumerate(zip(N.tolist(), D.tolist(), strict=True)):
        for k in range(1, 9):
            loss = float(law.loss(TRUTH, n, d * k / 8)) * (1 + above * math.cos(math.pi * k / 16))
            lines.append(f"r{number},{n},{k},{d * k / 8},{loss}")
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n")
    warnings = prepare(str(path), FitOptions())[2]
    assert [("--points last" in text) for text in warnings] == [True] * (above > 0)
    _, table, warnings = prepare(str(path), FitOptions(points="last"))
    np.testing.assert_allclose(np.sort(table.loss), np.sort(L), rtol=1e-6)
    assert warnings == []


@pytest.mark.parametrize(("shown", "factor"), [("{:.4f}", 1.0), ("{:.2f}", 100.0), ("{:.2f}%", 100.0)])
def test_accuracies_may_be_in_percent(tmp_path: Path, shown: str, factor: float) -> None:
    lines, accuracies = ["run,params,tokens,arc_bpb,arc_acc"], []
    for number, (n, d, x) in enumerate(zip(N.tolist(), D.tolist(), L.tolist(), strict=True)):
        accuracy = 0.95 - 0.7 / (1 + math.exp(-4 * (x / 4 - 0.7)))
        lines.append(f"r{number},{n},{d},{x / 4},{shown.format(factor * accuracy)}")
        accuracies.append(accuracy)
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n")
    task = Task("arc", "arc_bpb", "arc_acc")
    found = task_ladder(read_source(str(path)), task)
    np.testing.assert_allclose(np.concatenate(found.smooth_accuracy), accuracies, atol=1e-4)
    path.write_text(path.read_text().replace("r3,", "r3,", 1).replace(lines[4].rpartition(",")[2], "512"))
    with pytest.raises(UserError, match="line 5: 512"):
        task_ladder(read_source(str(path)), task)


def test_two_recipes_in_one_table_are_compared(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = ["recipe,params,tokens,seed,loss"]
    noise = generator.normal(size=(5, 2))
    for name, multiplier in (("old", 1.0), ("new", 1.3)):
        one = ladder(multiplier, 0, noise, generator)
        rows = zip(one.params.tolist(), one.tokens.tolist(), one.seed, one.loss.tolist(), strict=True)
        lines += [f"{name},{n},{d},{seed},{loss}" for n, d, seed, loss in rows]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="same runs") as refused:
        compare_recipes(str(path), str(path), None, "flops", None, (None, None), None)
    assert "--where-b" in (refused.value.fix or "")
    done = run_here(
        "scaling", "compare", path, path, "--where-a", "recipe == old", "--where-b", "recipe == new", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(done.stdout)
    low, high = found["ladder"]["interval"]
    assert low <= 1.3 <= high
    assert found["names"] == ["a.csv, (recipe == old)", "a.csv, (recipe == new)"]
    _, _, warnings = prepare(str(path), FitOptions())
    assert any("'recipe'" in text for text in warnings)
