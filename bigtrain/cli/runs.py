"""Commands on runs: train, status, stop, sample, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bigtrain.cli.common import RUNS, Json, Overrides, PluginOption, RunsDir, errors, load, plugged, show

app = typer.Typer()


def runs_dir_of(config: Path, runs_dir: Path | None) -> Path:
    """Where the run of a config lives: beside its siblings, where the config is that of an existing run."""
    if runs_dir is not None:
        return runs_dir
    return config.resolve().parent.parent if (config.parent / "run.json").exists() else RUNS


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

        code = start(load(config, overrides, name, plugin), runs_dir_of(config, runs_dir), procs=nproc, fork=fork)
    raise typer.Exit(int(code))


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="A run; all of them where left out.")] = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show where runs stand."""
    with errors(as_json):
        from bigtrain.run import Lease, find_run, list_runs
        from bigtrain.tracking.status import status as read_status

        found = [find_run(name, runs_dir)] if name else list_runs(runs_dir)
        rows = []
        for run in found:
            holder = Lease.holder(run)
            rows.append(read_status(run.path, alive=holder is not None and holder.alive()))
        result = rows[0] if name else {"runs": rows}
        show(
            result,
            as_json,
            lambda _: "\n".join(_status_line(row) for row in rows) or f"No runs in {runs_dir}",
        )


def _status_line(row: dict[str, Any]) -> str:
    parts = [f"{row['name']}: {row['state']}"]
    for key, form in (
        ("step", "step {}"),
        ("loss", "loss {:.4f}"),
        ("tokens_per_s", "{:.0f} tokens/s"),
        ("goodput", "goodput {:.0%}"),
        ("restarts", "{} restarts"),
        ("eta_s", "{:.0f} s left"),
    ):
        if row.get(key) is not None:
            parts.append(form.format(row[key]))
    if row.get("epochs"):
        parts.append("epochs " + ", ".join(f"{name} {count:.2f}" for name, count in row["epochs"].items()))
    return "  ".join(parts)


@app.command()
def stop(
    name: Annotated[str, typer.Argument(help="A run on this machine.")],
    now: Annotated[bool, typer.Option("--now", help="At once, without a save.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Let a run save itself and end; it can be resumed."""
    with errors():
        from bigtrain.jobs.stop import stop as end
        from bigtrain.run import find_run

        print(end(find_run(name, runs_dir), now))


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="A run, or RUN@STEP.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest only.")] = None,
    seed: Annotated[int, typer.Option(help="Another text for another number.")] = 0,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Continue a prompt with the weights of a run."""
    with errors(as_json):
        from bigtrain.run import find_run, split_run_step

        name, step = split_run_step(run)
        directory = find_run(name, runs_dir)
        from bigtrain.training.sample import sample as draw  # torch, which takes seconds

        text = draw(
            directory,
            prompt,
            step=step,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            plugin=plugged(plugin),
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
