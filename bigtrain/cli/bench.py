"""Commands that measure."""

from __future__ import annotations

import os
import sys

import typer

app = typer.Typer(help="Measure this machine and this build.", no_args_is_help=True)


@app.command(
    "train", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench_train(context: typer.Context) -> None:
    """Compare a training step with a plain PyTorch loop's, paired in one run; --help shows its options."""
    os.execv(sys.executable, [sys.executable, "-m", "bigtrain.testing.bench_train", *context.args])
