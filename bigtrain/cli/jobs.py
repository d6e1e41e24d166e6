"""Commands for runs on this machine or on a cluster: status, events, logs, stop, resume."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bigtrain.cli.common import (
    RUNS,
    Json,
    Now,
    Nproc,
    PluginOption,
    RunsDir,
    bring_back_here,
    errors,
    load,
    load_plugins,
    show,
)
from bigtrain.cli.remote import (
    DETACHED,
    Address,
    TokenFile,
    driver_lines,
    open_dashboard,
    reached,
    status_line,
    view_of,
)
from bigtrain.cli.submit import request_maker, send

if TYPE_CHECKING:
    from bigtrain.run import RunDirectory

app = typer.Typer()


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Name of a run; default: all runs.")] = None,
    address: Address = None,
    token_file: TokenFile = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show the state and progress of runs."""
    with errors(as_json):
        if name is not None:
            with view_of(name, address, token_file, runs_dir) as view:
                rows = [view.status()]
        elif address is not None:
            from bigtrain.jobs.cluster.views import cluster_views

            dashboard = open_dashboard(address, token_file)
            with reached(dashboard):
                rows = [view.status() for view in cluster_views(dashboard)]
        else:
            from bigtrain.jobs.cluster.views import LocalView
            from bigtrain.run import list_runs

            rows = [LocalView(run).status() for run in list_runs(runs_dir)]
        place = runs_dir if address is None else address
        show(
            rows[0] if name is not None else {"runs": rows},
            as_json,
            lambda _: "\n".join(map(status_line, rows)) or f"No runs in {place}",
        )


@app.command()
def events(
    name: Annotated[str, typer.Argument(help="A run.")],
    address: Address = None,
    token_file: TokenFile = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show the events of a run."""
    with errors(as_json), view_of(name, address, token_file, runs_dir) as view:
        show({"events": view.events()}, as_json, lambda result: "\n".join(map(_event_line, result["events"])))


def _event_line(event: dict[str, Any]) -> str:
    from bigtrain.tracking.live import event_line

    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
    return f"{at}  {event_line(event).removeprefix('event ')}"


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="A run.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow the log to the end of the run.")] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Rank whose log is shown; default: the driver on a cluster, rank 0 on this machine."),
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=0, help="Number of the attempt; default: the newest.")] = None,
    submission: Annotated[
        str | None, typer.Option(metavar="N", help="On a cluster: number or id of an earlier submission.")
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Print the log of a run or of one of its ranks."""
    with errors(), view_of(name, address, token_file, runs_dir) as view:
        from bigtrain.config import UserError
        from bigtrain.jobs.cluster.views import ClusterView, read_log

        if submission is not None:
            if not isinstance(view, ClusterView):
                fix = "Give the cluster with --address. On this machine, use --attempt to choose a start of the run."
                raise UserError("Only a cluster has submissions", "--submission", fix)
            view = view.submission(submission)
        try:
            if isinstance(view, ClusterView) and rank is None and attempt is None:
                for line in driver_lines(view.follow_driver() if follow else iter([view.driver_log()])):
                    print(line, flush=True)
                return
            for chunk in read_log(view, rank or 0, attempt, follow):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        except KeyboardInterrupt:
            raise typer.Exit(DETACHED) from None


@app.command()
def stop(
    runs: Annotated[list[str], typer.Argument(metavar="NAME...", help="Runs.")],
    now: Now = False,
    address: Address = None,
    token_file: TokenFile = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Save and stop runs; they can be resumed."""
    with errors():
        from bigtrain.jobs.stop import each

        if address is None:
            from bigtrain.jobs.stop import stop as end
            from bigtrain.run import find_run

            each(runs, lambda name: end(find_run(name, runs_dir), now), print)
            return
        from bigtrain.jobs.cluster.submission import stop as end_job

        dashboard = open_dashboard(address, token_file)
        with reached(dashboard):
            each(runs, lambda name: end_job(dashboard, name, now), print)


def _brought_here(url: str, runs_dir: Path) -> RunDirectory:
    from bigtrain.checkpoint.restore import bring_back_from

    run, done = bring_back_from(url, runs_dir)
    print(done, file=sys.stderr)
    return run


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="A run, or its URL on a store: s3://BUCKET/PREFIX/NAME, or NAME@STEP.")],
    step: Annotated[int | None, typer.Option(min=0, help="Resume from the checkpoint of this step.")] = None,
    nproc: Nproc = None,
    address: Address = None,
    token_file: TokenFile = None,
    follow: Annotated[bool, typer.Option("--follow", help="On a cluster: show the run until it ends.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="On a cluster: exit with the run's code.")] = False,
    secrets_file: Annotated[Path | None, typer.Option(help="File of secret keys for the ranks, on the nodes.")] = None,
    plugin: PluginOption = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Directory of the runs.")] = None,
    as_json: Json = False,
) -> None:
    """Resume a run from its newest checkpoint, or from an older one, with its recorded config."""
    began = time.time()
    with errors(as_json):
        if address is None:
            from bigtrain.config.urls import is_url
            from bigtrain.jobs.train import train as start
            from bigtrain.run import find_run

            load_plugins(plugin)
            run = _brought_here(name, runs_dir or RUNS) if is_url(name) else find_run(name, runs_dir or RUNS)
            config = load(run.config, None, plugin=plugin)
            bring_back_here(config, run.path.parent)
            code = start(config, run.path.parent, procs=nproc, step=step)
        else:
            from bigtrain.jobs.cluster.submission import of_resume

            make = request_maker(began, secrets_file, None)
            dashboard = open_dashboard(address, token_file)
            with reached(dashboard):
                submission = of_resume(dashboard, name, runs_dir, make, step)
            code = send(dashboard, submission, False, follow, wait, as_json)
    raise typer.Exit(int(code))
