"""How a command line is divided between a command and the user's own script."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from bigtrain.cli.arguments import ScriptCommand, after_dashes, script_words

app = typer.Typer()


@app.command(cls=ScriptCommand)
def show(context: typer.Context, words: list[str] | None = typer.Argument(None), name: str = "") -> None:  # noqa: B008
    job, arguments = script_words(words or [], after_dashes(context))
    print(f"{name}|{job}|{arguments}")


@pytest.mark.parametrize(
    ("line", "job", "arguments"),
    [
        (["--name", "a", "--", "gs://b//c", "./d/"], [], ["gs://b//c", "./d/"]),
        (["job.max_failures=1", "--name", "a", "--", "job.max_failures=2", "--name", "b", "--", "-x"],
         ["job.max_failures=1"], ["job.max_failures=2", "--name", "b", "--", "-x"]),
        (["--name", "a", "lr=1"], [], ["lr=1"]),
        (["--name", "a", "--"], [], []),
    ],
)  # fmt: skip
def test_words_after_the_dashes_are_the_scripts(line: list[str], job: list[str], arguments: list[str]) -> None:
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert done.output.strip() == f"a|{job}|{arguments}"
