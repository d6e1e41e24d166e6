"""Readers of runs from CSV, JSON lines, a sweep's directory, W&B's offline files, a W&B project, or memory."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from bigtrain.config import UserError
from bigtrain.scaling.runs.columns import ColumnNames, Columns, rows_to_columns, to_table
from bigtrain.scaling.runs.numbers import parse_number
from bigtrain.scaling.runs.table import RunTable
from bigtrain.storage import read_lines
from bigtrain.tracking.metrics import read_run_metrics

SWEEP_TRIALS = "trials"
"""Folder in a sweep's directory with the run directories, whose metrics.jsonl has every evaluation."""
SWEEP_RUNS = "runs.jsonl"
"""File in a sweep's directory with one object per finished branch; see `bigtrain.sweeps.results.row_of`."""
SWEEP_TUNING = "tuning.jsonl"
"""File in a sweep's directory with one object per run that tuned a learning rate; `val_loss` is null if it diverged."""
WANDB_PREFIX = "wandb:"
IN_MEMORY = "a table in memory"
"""Name of the source of runs that were not read from a file."""


class Frame(Protocol):
    """A table in memory, such as a pandas DataFrame."""

    def to_dict(self, orient: Literal["list"], /) -> Mapping[Any, Sequence[Any]]:
        """The columns of the table, by name."""
        ...


RunSource = str | Mapping[str, Sequence[object]] | Frame


Rows = Literal["runs", "curves", "tuning"]


def read_source(source: RunSource, named: ColumnNames | None = None, rows: Rows = "runs") -> RunTable:
    """Read a table of runs from a SOURCE, as for `bigtrain scaling fit`.

    Args:
        source: A .csv, .tsv or JSON-lines file; a sweep's directory; a directory with W&B's offline files; or
            wandb:ENTITY/PROJECT. Or a table in memory: a DataFrame, or columns by name.
        named: Columns that the user has named.
        rows: Which rows to read from a sweep's directory: its finished runs ("runs"), every evaluation of them
            ("curves"), or the runs that tuned its learning rates ("tuning").

    Raises:
        UserError: The source does not exist or cannot be read, or a column that is needed is missing.
    """
    columns, place, notes, native = _read(source, rows)
    table = to_table(columns, place, source if isinstance(source, str) else IN_MEMORY, named or ColumnNames())
    return replace(table, native=native, notes=(*notes, *table.notes))


def read_columns(source: str) -> list[str]:
    """Names of the columns of a SOURCE."""
    return list(_read(source, "curves")[0])


def _read(source: RunSource, rows: Rows) -> tuple[Columns, list[str], list[str], bool]:
    """The columns, the position of each row in the source, notes, and whether bigtrain wrote the source."""
    if not isinstance(source, str):
        found = source if isinstance(source, Mapping) else source.to_dict("list")
        in_memory: Columns = {str(name): list(values) for name, values in found.items()}
        length = max(map(len, in_memory.values()), default=0)
        return in_memory, [f"row {number}" for number in range(1, length + 1)], [], False
    if source.startswith(WANDB_PREFIX):
        from bigtrain.scaling.runs.wandb_api import read_project

        return (*read_project(source.removeprefix(WANDB_PREFIX)), [], False)
    path = Path(source)
    if path.is_dir():
        return (*_directory(path, rows), True)
    if not path.exists():
        raise UserError(
            f"'{source}' does not exist", source,
            "Give a .csv or .jsonl file, a sweep's directory, W&B's offline files, or wandb:ENTITY/PROJECT.",
        )  # fmt: skip
    if path.suffix.lower() in (".csv", ".tsv", ".txt") or not _is_json(path):
        return (*_read_csv(path), False)
    return (*_read_json_lines(path), [], False)


def _is_json(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return path.suffix.lower().startswith(".json") or file.read(1000).lstrip()[:1] in ("{", "[", "")


def _directory(path: Path, wanted: Rows) -> tuple[Columns, list[str], list[str]]:
    """The columns, the position of each row, and notes, from a sweep's directory or W&B's offline files."""
    if wanted == "tuning" and (path / SWEEP_RUNS).exists():
        if not (file := path / SWEEP_TUNING).exists():
            raise UserError(
                "The sweep has tuned no learning rate",
                str(path),
                "Add a section learning_rates to its YAML, and run it.",
            )
        return (*rows_to_columns([(f"line {i}", row) for i, row in enumerate(read_lines(file), 1)]), [])
    if (file := path / SWEEP_RUNS).exists() and wanted == "curves":
        return (*rows_to_columns(_evaluations(path, list(read_lines(file)))), [])
    if (file := path / SWEEP_RUNS).exists():
        return (*rows_to_columns([(f"line {i}", row) for i, row in enumerate(read_lines(file), 1)]), [])
    from bigtrain.scaling.runs.wandb_offline import find_files, read_runs

    if not find_files(path):
        raise UserError(
            f"There are no runs in '{path}': neither a sweep's {SWEEP_RUNS} nor W&B's offline files", str(path)
        )
    runs = read_runs(path)
    failed = [run.name or run.id for run in runs if run.exit_code]
    notes = []
    if failed:
        names = ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
        notes.append(f"{len(failed)} runs that failed are not read: {names}")
    return (*rows_to_columns([(run.id, run.row()) for run in runs if not run.exit_code]), notes)


def _evaluations(path: Path, runs: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """One row per evaluation of a sweep's runs, with the columns of the run and the metrics of that step."""
    rows = []
    for run in runs:
        name = str(run["run"])
        share = float(run["flops"]) / float(run["tokens"])
        for row in read_run_metrics(path / SWEEP_TRIALS / name):
            if row.get("val_loss") is not None:
                found = {**run, **row, "flops": share * float(row["tokens"]), "phase": None}
                rows.append((f"{name}, step {row['step']}", found))
    return rows


_MARKS = "\t;,"
_DECIMAL_COMMA = re.compile(
    r"\s*[+-]?(?:[0-9]+|[0-9]{1,3}(?:\.[0-9]{3})+),[0-9]+(?:[eE][+-]?[0-9]+)?\s*[kKmMbBgGtT]?\s*"
)
_POINTS = re.compile(r"\s*[+-]?[0-9]{1,3}(?:\.[0-9]{3})+\s*")


def _read_csv(path: Path) -> tuple[Columns, list[str], list[str]]:
    """The columns, the position of each row, and notes. Columns are separated by tabs, semicolons or commas."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = file.read().splitlines(keepends=True)
        mark = _mark(lines)
        reader = csv.reader(lines, delimiter=mark)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The file is not CSV in UTF-8: {error}", str(path)) from None
    if not rows:
        raise UserError("The file is empty", str(path))
    while len(rows) > 1 and rows[0][1][0].startswith("#") and len(rows[0][1]) < len(rows[1][1]):
        rows.pop(0)  # A comment.
    at, header = rows[0]
    if len(header) == 1 and max(len(row) for _, row in rows) <= 1 and len(rows) > 1:
        raise UserError(
            f"The file has one column, '{header[0]}'", f"{path}, line {at}",
            "Separate the columns with commas, semicolons or tabs.",
        )  # fmt: skip
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(
                f"The row has {len(row)} values for {len(header)} columns", f"{path}, line {number}",
                f"Repair the row, or line {at} if it is no header of {len(row)} columns; quote cells with '{mark}'.",
            )  # fmt: skip
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise UserError(f"Two columns have the name '{twice}'", f"{path}, line {at}", "Rename or delete one of them.")
    cells = [row for _, row in rows[1:]]
    notes = []
    if mark != "," and _has_decimal_commas(cells):
        cells = [[_with_point(cell) for cell in row] for row in cells]
        notes.append("commas in numbers are decimal marks, points separate thousands")
    columns: Columns = {name: [row[i] for row in cells] for i, name in enumerate(header) if name}
    return columns, [f"line {number}" for number, _ in rows[1:]], notes


def _mark(lines: list[str]) -> str:
    """The separator of the columns: the first of `_MARKS` by which two of the first lines have several columns each."""
    first = [line for line in lines if line.strip()][:3][-2:]
    for mark in _MARKS:
        widths = {len(row) for row in csv.reader(first, delimiter=mark)}
        if len(widths) == 1 and widths != {1}:
            return mark
    return max(reversed(_MARKS), key=first[0].count) if first else ","


def _has_decimal_commas(cells: list[list[str]]) -> bool:
    """Whether some number has a decimal comma, which cannot separate thousands, and none a decimal point."""
    numbers = [cell for row in cells for cell in row if cell[-1:].isalnum()]
    comma = any(_DECIMAL_COMMA.fullmatch(cell) and parse_number(cell) is None for cell in numbers)
    point = any("." in cell and parse_number(cell) is not None and not _POINTS.fullmatch(cell) for cell in numbers)
    return comma and not point


def _with_point(cell: str) -> str:
    if _DECIMAL_COMMA.fullmatch(cell) or _POINTS.fullmatch(cell):
        return cell.replace(".", "").replace(",", ".")
    return cell


def _json_columns(text: str) -> Columns | None:
    """The columns of a JSON object of arrays of one length, or of objects by row as pandas writes them; else None."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not found:
        return None
    columns = {name: list(one.values()) if isinstance(one, dict) else one for name, one in found.items()}
    if not all(isinstance(one, list) for one in columns.values()):
        return None
    return columns if len({len(one) for one in columns.values()}) == 1 else None


def _read_json_lines(path: Path) -> tuple[Columns, list[str]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    number = 1
    try:
        text = path.read_text(encoding="utf-8-sig")
        if (columns := _json_columns(text)) is not None:
            return columns, [f"row {i}" for i in range(1, len(next(iter(columns.values()))) + 1)]
        if text.lstrip()[:1] == "[":
            found = json.loads(text)
            if not all(isinstance(value, dict) for value in found):
                raise UserError("The file is not an array of JSON objects", str(path))
            return rows_to_columns([(f"object {i}", value) for i, value in enumerate(found, 1)])
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            value = json.loads(line)
            if not isinstance(value, dict):
                raise UserError("The line is not a JSON object", f"{path}, line {number}")
            rows.append((f"line {number}", value))
    except UnicodeDecodeError as error:
        raise UserError(f"The file is not text in UTF-8: {error.reason}", str(path)) from None
    except ValueError as error:
        raise UserError(f"The line is not JSON: {error}", f"{path}, line {number}") from None
    return rows_to_columns(rows)
