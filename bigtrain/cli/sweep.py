"""The commands `bigtrain sweep`: plan, run and inspect sweeps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bigtrain.cli.common import RUNS, Json, NewName, Now, Overrides, PluginOption, RunsDir, errors, load_plugins, show

app = typer.Typer(help="Sweeps of small runs that end in a scaling law.", no_args_is_help=True)

SweepFile = Annotated[Path, typer.Argument(help="A sweep's YAML.")]
SweepName = Annotated[str, typer.Argument(help="A sweep's name under --runs-dir, or its path.")]
TrialName = Annotated[str, typer.Argument(help="Name of a trial, as in `sweep status`.")]


@app.command("plan")
def sweep_plan(
    sweep: SweepFile,
    overrides: Overrides = None,
    name: NewName = None,
    measure: Annotated[
        bool,
        typer.Option(
            help="Measure tokens per second on this machine if they are not known; otherwise no times are printed."
        ),
    ] = True,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Plan one of a pair of sweeps for two recipes: print the expected width of their multiplier.",
        ),
    ] = False,
    rates: Annotated[
        Path | None,
        typer.Option(metavar="LAWS", help="Directory of `scaling rates`, which proposes learning rates and batches."),
    ] = None,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show the grid of a sweep, its cost, and the expected width of the interval of its prediction."""
    with errors(as_json):
        from bigtrain.sweeps.load import load_sweep
        from bigtrain.sweeps.plan import make_plan, plan_text

        load_plugins(plugin)
        loaded = load_sweep(sweep, overrides, name)
        plan = make_plan(loaded, runs_dir, measure=measure, say=_say, compare=compare, rates=rates)
        show(plan, as_json, plan_text)


@app.command("run")
def sweep_run(
    sweep: SweepFile,
    overrides: Overrides = None,
    name: NewName = None,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Run or resume a sweep; points that were added to the file are added to the sweep."""
    with errors():
        from bigtrain.sweeps.driver import run_sweep
        from bigtrain.sweeps.load import load_sweep

        load_plugins(plugin)
        code = run_sweep(load_sweep(sweep, overrides, name), runs_dir, sys.stderr)
    raise typer.Exit(int(code))


@app.command("resume")
def sweep_resume(sweep: SweepName, plugin: PluginOption = None, runs_dir: RunsDir = RUNS) -> None:
    """Resume a sweep with its recorded config."""
    with errors():
        code = _resume(sweep, runs_dir, plugin)
    raise typer.Exit(code)


@app.command("status")
def sweep_status(sweep: SweepName, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Show the state and progress of a sweep and its trials."""
    with errors(as_json):
        from bigtrain.sweeps.journal import find_sweep
        from bigtrain.sweeps.status import sweep_status as read

        show(read(find_sweep(sweep, runs_dir)), as_json, _status_text)


@app.command("stop")
def sweep_stop(
    sweep: SweepName,
    now: Now = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Save the running trials and stop the sweep; it can be resumed."""
    with errors():
        from bigtrain.jobs.stop import stop
        from bigtrain.sweeps.journal import find_sweep

        print(stop(find_sweep(sweep, runs_dir), now, noun="sweep"))


@app.command("logs")
def sweep_logs(sweep: SweepName, trial: TrialName, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Print the log of a trial's launcher, and the paths of its ranks' logs."""
    with errors(as_json):
        from bigtrain.sweeps.journal import find_sweep, read_state

        directory = find_sweep(sweep, runs_dir)
        read_state(directory.journal).get(trial)
        log = directory.log(trial)
        text = log.read_text(errors="replace") if log.exists() else ""
        ranks = [str(path) for path in sorted(directory.run(trial).logs.glob("attempt_*/rank_*.log"))]
        result = {"trial": trial, "log": str(log), "text": text, "ranks": ranks}
        show(result, as_json, lambda value: "\n".join([value["text"].rstrip(), *value["ranks"]]))


@app.command("retry")
def sweep_retry(sweep: SweepName, trial: TrialName, plugin: PluginOption = None, runs_dir: RunsDir = RUNS) -> None:
    """Allow a failed or refused trial to run again, and resume the sweep."""
    with errors():
        from bigtrain.sweeps.driver import let_retry
        from bigtrain.sweeps.journal import find_sweep

        let_retry(find_sweep(sweep, runs_dir), trial)
        code = _resume(sweep, runs_dir, plugin)
    raise typer.Exit(code)


def _resume(sweep: str, runs_dir: Path, plugin: list[str] | None) -> int:
    from bigtrain.sweeps.driver import run_sweep
    from bigtrain.sweeps.journal import find_sweep
    from bigtrain.sweeps.load import load_sweep

    directory = find_sweep(sweep, runs_dir)
    load_plugins(plugin)
    loaded = load_sweep(directory.config, name=directory.name)
    return int(run_sweep(loaded, directory.path.parent, sys.stderr))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _status_text(status: dict[str, Any]) -> str:
    lines = [
        f"{status['name']}: {status['state']}, {status['finished']} of {len(status['trials'])} trials finished, "
        f"{status['flops_done']:.3g} of {status['flops']:.3g} FLOPs, {status['flops_saved']:.3g} saved by trunks"
    ]
    if status["undecided"] and status["state"] != "running":
        sizes = ", ".join(map(str, status["undecided"]))
        lines.append(f"no learning rate was chosen, so the grid is missing: size {sizes}")
    width = max((len(row["trial"]) for row in status["trials"]), default=0)
    for row in status["trials"]:
        shown = row["val_loss"] if row["val_loss"] is not None else row["loss"]
        loss = f"loss {shown:.4f}" if shown is not None else ""
        cause = f"  {row['cause']}" if row["cause"] else ""
        tries = f"  {row['attempts']} attempts" if row["attempts"] > 1 else ""
        lines.append(
            f"{row['trial']:{width}}  {row['state']:8}  {row['step']}/{row['steps']}  {loss}{tries}{cause}".rstrip()
        )
    return "\n".join(lines)
