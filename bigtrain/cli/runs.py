"""Commands on runs on this machine: train, sample, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bigtrain.cli.common import (
    RUNS,
    Json,
    Overrides,
    PluginOption,
    RunsDir,
    bring_back_here,
    errors,
    load,
    load_plugins,
    show,
)
from bigtrain.run.names import RECORD

app = typer.Typer()


def runs_dir_of(config: Path, runs_dir: Path | None) -> Path:
    """Where the run of a config lives: beside its siblings, where the config is that of an existing run."""
    if runs_dir is not None:
        return runs_dir
    return config.resolve().parent.parent if (config.parent / RECORD).exists() else RUNS


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, instead of the file's.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine.")] = None,
    fork: Annotated[str | None, typer.Option(help="Start a new run from the newest checkpoint.")] = None,
    plugin: PluginOption = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Where runs live.")] = None,
) -> None:
    """Train a run on this machine; a run that exists resumes where it is."""
    with errors():
        from bigtrain.jobs.train import train as start

        loaded, place = load(config, overrides, name, plugin), runs_dir_of(config, runs_dir)
        bring_back_here(loaded, place)
        code = start(loaded, place, procs=nproc, fork=fork)
    raise typer.Exit(int(code))


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="A run, or RUN@STEP; a name, a path or a URL.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    image: Annotated[Path | None, typer.Option(help="The image to be captioned, for a model of captions.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest only.")] = None,
    seed: Annotated[int, typer.Option(help="Another text for another number.")] = 0,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Continue a prompt, or write an image's caption, with the weights of a run."""
    with errors(as_json):
        from bigtrain.checkpoint.restore import run_at

        load_plugins(plugin)
        directory, step = run_at(run, runs_dir)
        from bigtrain.training.sample import sample as draw  # torch, which takes seconds

        text = draw(
            directory,
            prompt,
            step=step,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            image=image,
        )
        show({"text": text}, as_json, lambda result: result["text"])


@app.command()
def report(run: Annotated[str, typer.Argument(help="A run.")], runs_dir: RunsDir = RUNS) -> None:
    """Write a run's report: one HTML file that opens offline."""
    with errors():
        from bigtrain.run import Lease, find_run
        from bigtrain.tracking.report import write_report

        directory = find_run(run, runs_dir)
        holder = Lease.holder(directory)
        print(write_report(directory.path, alive=holder is not None and holder.alive()))
