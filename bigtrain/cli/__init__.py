"""The commands, one file for each group. Commands only parse arguments, call the library and print the result."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import bigtrain
from bigtrain.cli import (
    bench,
    checkpoint,
    cluster,
    configs,
    data,
    doctor,
    jobs,
    plan,
    runs,
    scaling,
    scaling_decide,
    submit,
    sweep,
)

app = typer.Typer(
    name="bigtrain",
    help="Train transformer models with one YAML file, from a laptop's CPU to a cluster of GPUs.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(runs.app)
app.add_typer(submit.app)
app.add_typer(jobs.app)
app.add_typer(doctor.app)
app.add_typer(plan.app)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(configs.app, name="config")
app.add_typer(scaling.app, name="scaling")
scaling_decide.register(scaling.app)
app.add_typer(sweep.app, name="sweep")
app.add_typer(bench.app, name="bench")
app.add_typer(cluster.app, name="cluster")


def _version(value: bool) -> None:
    if value:
        print(f"bigtrain {bigtrain.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


def main() -> None:
    """The `bigtrain` command."""
    try:
        app()
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        sys.exit(130)
