"""The commands `tasks`, `compare` and `rates` of `bigtrain scaling`: read sources, and return and write results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.scaling.compare import Cost, compare
from bigtrain.scaling.compare_page import compare_page
from bigtrain.scaling.document import finite
from bigtrain.scaling.fit import prepare
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.rates import Edges, PowerLaw, rate_laws
from bigtrain.scaling.rates_page import rates_page
from bigtrain.scaling.runs.columns import ColumnNames
from bigtrain.scaling.runs.readers import read_columns, read_source
from bigtrain.scaling.runs.units import check_values
from bigtrain.scaling.runs.where import where as select
from bigtrain.scaling.tasks import Task, fit_task, guess_tasks
from bigtrain.storage import write_atomic, write_json

COMPARE_KIND = "bigtrain comparison of recipes"
TASKS_KIND = "bigtrain task laws"
RATES_KIND = "bigtrain rate laws"
RATES_FILE = "rates.json"


def predict_tasks(
    source: str, params: float, tokens: float, named: Sequence[str], where: str | None, out: Path | None, seed: int
) -> dict[str, Any]:
    """Predict the accuracy of each downstream task at (N, D) from a ladder of small models.

    Args:
        source: Checkpoints of a ladder; see `read_source`.
        params: N of the prediction.
        tokens: D of the prediction.
        named: Tasks in the form NAME=LOSS:ACCURACY; empty: tasks are guessed from the names of the columns.
        where: An expression that selects rows; see `runs.where`.
        out: A directory into which tasks.json is written; None: no file.
        seed: Seed of the bootstrap.

    Returns:
        The content of tasks.json without the bootstrap replicates, and `files`, the paths written.

    Raises:
        UserError: There is no task, a column is missing, or the ladder does not determine the laws.
    """
    tasks = [_task(text) for text in named] or guess_tasks(read_columns(source))
    if not tasks:
        raise UserError(
            "There are no pairs of columns of a task's loss and accuracy", source,
            "Name them: --task hellaswag=hellaswag_bpb:hellaswag_accuracy",
        )  # fmt: skip
    table = read_source(source, ColumnNames(loss=tasks[0].loss), "curves")
    if where is not None:
        table = select(table, where)
    found = [fit_task(table, task, params, tokens, seed) for task in tasks]
    result = finite({"kind": TASKS_KIND, "format_version": 1, "source": source, "where": where, "tasks": found,
                     "notes": list(table.notes)})  # fmt: skip
    files = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "tasks.json", result)
        files.append(str(out / "tasks.json"))
    slim = [{name: value for name, value in one.items() if name != "replicates"} for one in result["tasks"]]
    return {**result, "tasks": slim, "files": files}


def _task(text: str) -> Task:
    name, mark, columns = text.partition("=")
    loss, colon, accuracy = columns.partition(":")
    if not (mark and colon and name and loss and accuracy):
        raise UserError(f"--task cannot be {text!r}", "command line", "Write NAME=LOSS:ACCURACY.")
    return Task(name, loss, accuracy)


def compare_recipes(
    first: str, second: str, target: float | None, cost: Cost, pair: bool | None, where: Sequence[str | None],
    out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Estimate the compute multiplier of the second source's recipe over the first's.

    Args:
        first: Runs of recipe A; see `read_source`.
        second: Runs of recipe B.
        target: FLOPs at which the multiplier is extrapolated; None: ten times the FLOPs of the largest run.
        cost: The quantity that is equal in the comparison.
        pair: Whether runs are compared in pairs; None: in pairs if enough runs share their seeds.
        where: Expressions that select the rows of recipe A and of recipe B; see `runs.where`.
        out: A directory into which compare.json and compare.html are written; None: no files.

    Returns:
        The content of compare.json, and `files`, the paths written.

    Raises:
        UserError: The input is bad, both recipes have the same runs, or the ladders have too few common cells.
    """
    prepared = [prepare(source, FitOptions(where=one)) for source, one in zip((first, second), where, strict=True)]
    tables = [one[1] for one in prepared]
    names = [Path(source).name or source for source in (first, second)]
    if first == second:
        names = [f"{name}, {one}" for name, one in zip(names, where, strict=True)]
    if tables[0].digest() == tables[1].digest():
        raise UserError(
            "A and B are the same runs", second,
            'Give two sources, or select the rows of each: --where-a "recipe == A" --where-b "recipe == B"',
        )  # fmt: skip
    warnings = [f"{name}: {text}" for name, one in zip(names, prepared, strict=True) for text in one[2]]
    found = compare(tables[0], tables[1], target, cost, pair)
    hashes = [table.digest() for table in tables]
    result = finite({"kind": COMPARE_KIND, "format_version": 1, "sources": [first, second], "names": names,
                     "data_hashes": hashes, "where": list(where), "warnings": warnings, **found})  # fmt: skip
    files = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "compare.json", result)
        write_atomic(out / "compare.html", compare_page(result))
        files = [str(out / "compare.json"), str(out / "compare.html")]
    return {**result, "files": files}


def fit_rates(
    source: str, columns: ColumnNames, where: str | None, edges: Edges, at: dict[str, float], out: Path | None
) -> dict[str, Any]:
    """Fit the laws of the best learning rate and the best batch.

    Args:
        source: Runs that sweep them; see `read_source`. From a sweep's directory, the runs that tuned learning rates.
        columns: Columns that the user has named.
        where: An expression that selects rows; see `runs.where`.
        edges: What to do with an optimum at the edge of its grid.
        at: Values of "params", "tokens" and "batch" at which the laws are evaluated; empty: nowhere.
        out: A directory into which rates.json and rates.html are written; None: no files.

    Returns:
        The content of rates.json, and `files`, the paths written.

    Raises:
        UserError: The input is bad, no setting is swept, an optimum lies at an edge and `edges` is "refuse", or `at`
            lacks a value that a law needs.
    """
    table = read_source(source, columns, "tuning")
    if where is not None:
        table = select(table, where)
    odd = check_values(table.take(np.isfinite(table.loss) & (table.loss > 0)))
    found = rate_laws(table, edges)
    notes = [*table.notes, *odd, *found.pop("notes")]
    asked = {name: _rate_at(name, one, at) for name, one in found.items()} if at else {}
    result = finite({"kind": RATES_KIND, "format_version": 1, "source": source, "where": where, "notes": notes,
                     "laws": found, "at": at, "best": asked})  # fmt: skip
    files = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RATES_FILE, result)
        write_atomic(out / "rates.html", rates_page(result))
        files = [str(out / RATES_FILE), str(out / "rates.html")]
    return {**result, "files": files}


def _rate_at(name: str, found: dict[str, Any], at: dict[str, float]) -> dict[str, Any] | None:
    law = PowerLaw.parse(found["law"])
    missing = [one for one in law.names if one not in at]
    if "loss" in missing and "tokens" in at:
        law, missing = PowerLaw.parse(found["others"]["tokens"]), []
    if missing:
        flags = " and ".join(f"--at-{one}" for one in missing)
        raise UserError(f"The law of {name} needs {' and '.join(missing)}", "command line", f"Give {flags} too.")
    return law.at(**{one: at[one] for one in law.names})


def read_rates(path: Path) -> dict[str, PowerLaw]:
    """Read the laws of a rates.json: "lr" and "batch", as far as it has them; the law of the batch is the one in D.

    Args:
        path: rates.json, or the directory that holds it.

    Raises:
        UserError: The file does not exist, or is not a rates.json.
    """
    file = path / RATES_FILE if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != RATES_KIND:
        raise UserError(f"There are no rate laws at '{path}'", str(file), "Write them: bigtrain scaling rates --out")
    laws = {name: PowerLaw.parse(one["law"]) for name, one in found["laws"].items()}
    if "batch" in laws and laws["batch"].names != ("tokens",):
        laws["batch"] = PowerLaw.parse(found["laws"]["batch"]["others"]["tokens"])
    return laws
