"""The commands `bigtrain bench`: measure training steps and hardware."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bigtrain.cli.common import Json, errors, show

app = typer.Typer(help="Measure this machine and this build.", no_args_is_help=True)


@app.command(
    "train", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench_train(context: typer.Context) -> None:
    """Compare a training step with that of a plain PyTorch loop, paired in one run; --help shows its options."""
    os.execv(sys.executable, [sys.executable, "-m", "bigtrain.testing.bench_train", *context.args])


@app.command("hardware")
def bench_hardware(
    out: Annotated[
        Path | None, typer.Option(help="YAML file that the entry is written to, for `plan --hardware`.")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; default: one per GPU, or one per core.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the entry; default: the host name.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine (matrix products, memory, collectives) for `bigtrain plan`."""
    with errors(as_json):
        from bigtrain.hardware.cluster import Cluster
        from bigtrain.planning.measure import entry_text, entry_yaml, measure_machine

        found = measure_machine(nproc, name=name)
        if out is not None:
            out.write_text(entry_yaml(found), encoding="utf-8")
            print(f"wrote {out}: bigtrain plan CONFIG --hardware {out}", file=sys.stderr)
        show(found.plain(), as_json, lambda plain: entry_text(Cluster.model_validate(plain)))
