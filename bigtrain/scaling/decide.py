"""What the commands of `bigtrain scaling` beyond fit and predict do, from sources to plain results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain.config import UserError
from bigtrain.scaling.document import finite
from bigtrain.scaling.runs.columns import ColumnNames
from bigtrain.scaling.runs.readers import read_columns, read_source
from bigtrain.scaling.runs.where import where as select
from bigtrain.scaling.tasks import Task, fit_task, guess_tasks
from bigtrain.storage import write_json

TASKS_KIND = "bigtrain task laws"


def predict_tasks(
    source: str, params: float, tokens: float, named: Sequence[str], where: str | None, out: Path | None, seed: int
) -> dict[str, Any]:
    """The accuracy of each task of a ladder at (N, D).

    Args:
        source: Checkpoints of a ladder, as `read_source` takes them.
        params: N.
        tokens: D.
        named: Tasks as NAME=LOSS:ACCURACY; none: guessed by the names of columns.
        where: Which rows.
        out: A directory for tasks.json.
        seed: Of the bootstrap.

    Raises:
        UserError: No task, columns that are missing, or a ladder from which no law follows.
    """
    tasks = [_task(text) for text in named] or guess_tasks(read_columns(source))
    if not tasks:
        raise UserError(
            "There are no pairs of columns of a task's loss and accuracy", source,
            "name them: --task hellaswag=hellaswag_bpb:hellaswag_accuracy",
        )  # fmt: skip
    table = read_source(source, ColumnNames(loss=tasks[0].loss), curves=True)
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
        raise UserError(f"--task cannot be {text!r}", "command line", "write NAME=LOSS:ACCURACY")
    return Task(name, loss, accuracy)
