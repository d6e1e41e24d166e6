"""Commands on jobs, here or on a cluster: submit, status, events, logs, stop, resume."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bigtrain import variables
from bigtrain.cli.arguments import ScriptCommand, after_dashes, script_words
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

if TYPE_CHECKING:
    from bigtrain.jobs.cluster.dashboard import Dashboard
    from bigtrain.jobs.cluster.package import Request
    from bigtrain.jobs.cluster.submission import Submission
    from bigtrain.jobs.cluster.views import ClusterView, View
    from bigtrain.jobs.config import JobConfig
    from bigtrain.run import RunDirectory

app = typer.Typer()

Address = Annotated[
    str | None,
    typer.Option(envvar=variables.ADDRESS, help="A Ray cluster's dashboard: http://HOST:8265. Without it: here."),
]
TokenFile = Annotated[
    Path | None, typer.Option(help="The cluster's token, mode 0600; else as Ray finds it: RAY_AUTH_TOKEN_PATH.")
]
DETACHED = 130


@contextmanager
def reached(dashboard: Dashboard) -> Iterator[None]:
    """Say it in one line where the dashboard does not answer any more."""
    from bigtrain.jobs.cluster.dashboard import DashboardGone

    try:
        yield
    except DashboardGone as error:
        raise dashboard.unreachable(error) from None


def open_dashboard(address: str, token_file: Path | None) -> Dashboard:
    from bigtrain.jobs.cluster.dashboard import Dashboard

    dashboard = Dashboard(address, token_file)
    if dashboard.is_exposed:
        _say("warning: the token travels in the clear to a public address: use TLS or a private network")
    return dashboard


@contextmanager
def _view(name: str, address: str | None, token_file: Path | None, runs_dir: Path) -> Iterator[View]:
    """A run on a cluster, or on this machine where no address is given."""
    if address is None:
        from bigtrain.jobs.cluster.views import LocalView
        from bigtrain.run import find_run

        yield LocalView(find_run(name, runs_dir))
        return
    from bigtrain.jobs.cluster.views import cluster_view

    dashboard = open_dashboard(address, token_file)
    with reached(dashboard):
        yield cluster_view(dashboard, name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command(cls=ScriptCommand)
def submit(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help="A run's YAML.")] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, instead of the file's.")] = None,
    address: Address = None,
    token_file: TokenFile = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the run until it ends; Ctrl-C only detaches.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end, and exit with its code.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, say what would be submitted, and stop.")] = False,
    max_duration: Annotated[str | None, typer.Option(metavar="D", help='Stop after "2 h"; it can be resumed.')] = None,
    secrets_file: Annotated[
        Path | None, typer.Option(help="Keys for the ranks: a file or a mounted Secret, on the nodes.")
    ] = None,
    script: Annotated[Path | None, typer.Option(help="Run this script, written for torchrun, after -- ARGS.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="With --script: nodes.")] = None,
    procs_per_node: Annotated[int | None, typer.Option(min=1, help="With --script: ranks on each node.")] = None,
    working_dir: Annotated[Path | None, typer.Option(help="With --script: a directory of source to ship.")] = None,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Start a run on a Ray cluster; it goes on when this command ends. The same name resumes it."""
    began = time.time()
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.jobs.scripts.launch import job_config

        make = _request(began, secrets_file, max_duration)
        if script is not None:
            words = [*([config] if config is not None else []), *(overrides or [])]
            job, arguments = script_words(words, after_dashes(context))
            job_section = job_config(job, nodes, procs_per_node)
            submission = _of_script(script, arguments, name, job_section, working_dir, make, runs_dir)
        elif config is None:
            raise UserError("There is nothing to submit", "CONFIG", "Name a run's YAML, or a script with --script.")
        elif nodes is not None or procs_per_node is not None or working_dir is not None:
            raise UserError(
                "--nodes, --procs-per-node and --working-dir go with --script",
                fix="Write job.nodes=N job.procs_per_node=P.",
            )
        else:
            from bigtrain.jobs.cluster.submission import of_config

            words = [*(overrides or []), *after_dashes(context)]
            submission = of_config(load(Path(config), words, name, plugin), runs_dir.absolute(), make)
        dashboard = open_dashboard(_required(address), token_file)
        code = _submit(dashboard, submission, dry_run, follow, wait, as_json)
    raise typer.Exit(code)


def _required(address: str | None) -> str:
    from bigtrain.config import UserError

    if address is None:
        raise UserError("No cluster is named", "--address", "Give --address http://HOST:8265 or set BIGTRAIN_ADDRESS.")
    return address


def _request(began: float, secrets_file: Path | None, max_duration: str | None) -> Callable[..., Request]:
    from bigtrain.config import Duration, UserError
    from bigtrain.jobs.cluster.package import Request, versions

    seconds = None
    if max_duration is not None:
        try:
            duration = Duration.parse(max_duration)
        except ValueError as error:
            raise UserError(str(error), "--max-duration", 'Write a time: "90 min", "2 h".') from None
        if not duration.is_time:
            raise UserError(f"'{max_duration}' is no time", "--max-duration", 'Write "90 min", or "2 h".')
        seconds = duration.seconds

    def make(name: str, runs_dir: Path, plugin: str | None = None) -> Request:
        secrets = None if secrets_file is None else str(secrets_file)
        return Request("", name, str(runs_dir), began, versions(), secrets, seconds, plugin)

    return make


def _of_script(
    script: Path,
    arguments: list[str],
    name: str | None,
    job: JobConfig,
    directory: Path | None,
    make: Callable[..., Request],
    runs_dir: Path,
) -> Submission:
    import re

    from bigtrain.config import UserError
    from bigtrain.jobs.cluster.submission import of_script
    from bigtrain.run import NAME_PATTERN

    if name is None or not re.match(NAME_PATTERN, name):
        raise UserError("A script needs a name", "--name", "Use letters, digits, '.', '_' and '-'.")
    return of_script(script, arguments, directory, job, lambda: make(name, runs_dir.absolute()))


def _submit(
    dashboard: Dashboard, submission: Submission, dry_run: bool, follow: bool, wait: bool, as_json: bool
) -> int:
    from dataclasses import replace

    from bigtrain.jobs.cluster.submission import check_capacity, check_versions, next_id, see_off

    with reached(dashboard):
        request = submission.request
        check_versions(dashboard, request.versions)
        dashboard.require_authentication()
        lacking = None if request.resume else check_capacity(dashboard, submission.job)
        id = next_id(dashboard, request.name)
        submission = replace(submission, request=replace(request, id=id))
        result: dict[str, Any] = {"submission": id, "name": request.name, "address": dashboard.url}
        if dry_run:
            shipped = sum(len(data) for _, data in submission.files) + len(submission.source.data)
            result |= {"nodes": submission.job.nodes, "procs_per_node": submission.job.procs_per_node}
            show({**result, "bytes": shipped, "waits_for": lacking}, as_json, _would)
            return 0
        if lacking is not None:
            _say(f"{request.name} will have to wait: {lacking}")
        view = submission.send(dashboard)
        sent = time.time()
        _say(f"{request.name}: submitted as {id}")
        if follow:
            return _follow(view)
        code = see_off(view)
        if code is not None:
            return _ended(view, code, as_json)
        board = view.board() or {}
        for line in board.get("notes", []):
            _say(line)
        if wait:
            code = _wait(view)
            if code in (1, 2):
                for line in _driver_lines(iter([view.driver_log()])):
                    _say(line)
            show({**result, "exit_code": code}, as_json, lambda _: _end_line(view))
            return code
        show(
            {**result, "times": board.get("times", {}) | {"sent": sent}},
            as_json,
            lambda _: _how_to_follow(view, dashboard),
        )
    return 0


def _would(result: dict[str, Any]) -> str:
    waits = f"\nit would wait: {result['waits_for']}" if result["waits_for"] else ""
    return (
        f"would submit {result['submission']} to {result['address']}: {result['nodes']} nodes x "
        f"{result['procs_per_node']} processes, {result['bytes'] / 1e6:.2f} MB of source{waits}"
    )


def _how_to_follow(view: ClusterView, dashboard: Dashboard) -> str:
    return f"it runs; see `bigtrain status {view.name}` and `bigtrain logs {view.name} -f`, --address {dashboard.url}"


def _follow(view: ClusterView) -> int:
    from bigtrain.jobs.cluster.views import exit_code

    try:
        for line in _driver_lines(view.follow_driver()):
            _say(line)
    except KeyboardInterrupt:
        _say(f"detached; {view.name} goes on: `bigtrain status {view.name}`")
        return DETACHED
    view.refresh()
    return exit_code(view.job, view.board())


def _driver_lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """What the driver says, without what Ray Jobs says before it."""
    rest, begun = "", False
    for chunk in chunks:
        *lines, rest = (rest + chunk.decode(errors="replace")).split("\n")
        for line in lines:
            if begun:
                yield line
            begun = begun or line.startswith("Running entrypoint for job ")
    if rest and begun:
        yield rest


def _wait(view: ClusterView) -> int:
    from bigtrain.jobs.cluster.dashboard import GONE_S
    from bigtrain.jobs.cluster.views import wait_for_end

    try:
        return wait_for_end(view, GONE_S)
    except KeyboardInterrupt:
        _say(f"detached; {view.name} goes on: `bigtrain status {view.name}`")
        return DETACHED


def _ended(view: ClusterView, code: int, as_json: bool) -> int:
    """Show why a job was over before its ranks ran."""
    error = (view.board() or {}).get("error")
    if as_json and error:
        print(json.dumps(error))
    else:
        for line in _driver_lines(iter([view.driver_log()])):
            _say(line)
        if code and not error:
            _say(f"{view.name}: {view.job.message}")
    return code


def _end_line(view: ClusterView) -> str:
    return _status_line(view.status())


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="A run; all of them where left out.")] = None,
    address: Address = None,
    token_file: TokenFile = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show where runs stand."""
    with errors(as_json):
        if name is not None:
            with _view(name, address, token_file, runs_dir) as view:
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
            lambda _: "\n".join(map(_status_line, rows)) or f"No runs in {place}",
        )


def _status_line(row: dict[str, Any]) -> str:
    parts = [f"{row['name']}: {row['state']}"]
    for key, form in (
        ("step", "step {}"),
        ("loss", "loss {:.4f}"),
        ("tokens_per_s", "{:.0f} tokens/s"),
        ("goodput", "goodput {:.0%}"),
        ("nodes", "{} nodes"),
        ("restarts", "{} restarts"),
        ("eta_s", "{:.0f} s left"),
        ("wandb_url", "{}"),
    ):
        if row.get(key) is not None:
            parts.append(form.format(row[key]))
    if row.get("epochs"):
        parts.append("epochs " + ", ".join(f"{name} {count:.2f}" for name, count in row["epochs"].items()))
    return "  ".join(parts)


@app.command()
def events(
    name: Annotated[str, typer.Argument(help="A run.")],
    address: Address = None,
    token_file: TokenFile = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show what has happened to a run."""
    with errors(as_json), _view(name, address, token_file, runs_dir) as view:
        show({"events": view.events()}, as_json, lambda result: "\n".join(map(_event_line, result["events"])))


def _event_line(event: dict[str, Any]) -> str:
    from bigtrain.tracking.live import event_line

    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
    return f"{at}  {event_line(event).removeprefix('event ')}"


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="A run.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on to the end of the run.")] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, help="A rank's own output; else the driver's on a cluster, rank 0's here.")
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=0, help="Of which attempt; the newest where left out.")] = None,
    address: Address = None,
    token_file: TokenFile = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Print what a run or one of its ranks says."""
    with errors(), _view(name, address, token_file, runs_dir) as view:
        from bigtrain.jobs.cluster.views import ClusterView, read_log

        try:
            if isinstance(view, ClusterView) and rank is None and attempt is None:
                for line in _driver_lines(view.follow_driver() if follow else iter([view.driver_log()])):
                    print(line, flush=True)
                return
            for chunk in read_log(view, rank or 0, attempt, follow):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        except KeyboardInterrupt:
            raise typer.Exit(DETACHED) from None


@app.command()
def stop(
    name: Annotated[str, typer.Argument(help="A run.")],
    now: Annotated[bool, typer.Option("--now", help="At once, without a save.")] = False,
    address: Address = None,
    token_file: TokenFile = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Let a run save itself and end; it can be resumed."""
    with errors():
        if address is None:
            from bigtrain.jobs.stop import stop as end
            from bigtrain.run import find_run

            print(end(find_run(name, runs_dir), now))
            return
        from bigtrain.jobs.cluster.submission import stop as end_job

        dashboard = open_dashboard(address, token_file)
        with reached(dashboard):
            print(end_job(dashboard, name, now))


def _brought_here(url: str, runs_dir: Path) -> RunDirectory:
    from bigtrain.checkpoint.restore import bring_back_from

    run, done = bring_back_from(url, runs_dir)
    print(done, file=sys.stderr)
    return run


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="A run, or its URL on a store: s3://BUCKET/PREFIX/NAME, or NAME@STEP.")],
    step: Annotated[int | None, typer.Option(min=0, help="Go back to the checkpoint of this step.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine.")] = None,
    address: Address = None,
    token_file: TokenFile = None,
    follow: Annotated[bool, typer.Option("--follow", help="On a cluster: show the run until it ends.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="On a cluster: exit with the run's code.")] = False,
    secrets_file: Annotated[Path | None, typer.Option(help="Keys for the ranks, on the nodes.")] = None,
    plugin: PluginOption = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Where runs live.")] = None,
    as_json: Json = False,
) -> None:
    """Go on with a run from its newest checkpoint, or from an older one, by the config that it recorded."""
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

            make = _request(began, secrets_file, None)
            dashboard = open_dashboard(address, token_file)
            with reached(dashboard):
                submission = of_resume(dashboard, name, runs_dir, make, step)
            code = _submit(dashboard, submission, False, follow, wait, as_json)
    raise typer.Exit(int(code))
