"""Commands that turn a law into a decision: task accuracy, comparisons of recipes, forecasts of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bigtrain.cli.common import Json, errors, show
from bigtrain.cli.scaling import number, quantities


def register(app: typer.Typer) -> None:
    """Add these commands to `bigtrain scaling`."""
    app.command("tasks")(scaling_tasks)


def scaling_tasks(
    source: Annotated[str, typer.Argument(help="Checkpoints of a ladder: a .csv or .jsonl file, or a sweep.")],
    at_params: Annotated[str, typer.Option(metavar="NUMBER", help="N to predict.")],
    at_tokens: Annotated[str, typer.Option(metavar="NUMBER", help="D to predict.")],
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LOSS:ACCURACY", help="A task's columns; guessed by NAME_bpb, NAME_accuracy."),
    ] = None,
    where: Annotated[str | None, typer.Option(help='Which rows: "role == ladder".')] = None,
    out: Annotated[Path | None, typer.Option(help="A directory; gets tasks.json.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Predict the accuracy of tasks at an N and a D, by two laws in a chain."""
    with errors(as_json):
        from bigtrain.scaling.decide import predict_tasks

        n, d = number("at-params", at_params), number("at-tokens", at_tokens)
        assert n is not None
        assert d is not None
        show(predict_tasks(source, n, d, task or [], where, out, seed), as_json, _tasks_text)


def _tasks_text(result: dict[str, Any]) -> str:
    text = list(result["notes"])
    for one in result["tasks"]:
        low, high = one["accuracy"]["interval"]
        text += [
            f"{one['task']}: {one['runs']} runs, accuracy {one['accuracy']['value']:.4f}  95 % [{low:.4f}, {high:.4f}]",
            *(f"  {line}" for line in quantities({"loss": one["loss"]})),
        ]
    return "\n".join([*text, *result["files"]])
