"""Commands that submit runs to a cluster and run a user's own scripts: submit, run."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bigtrain.cli.arguments import ScriptCommand, after_dashes, script_words
from bigtrain.cli.common import RUNS, Json, Overrides, PluginOption, RunName, RunsDir, errors, load, show
from bigtrain.cli.remote import (
    DETACHED,
    Address,
    TokenFile,
    driver_lines,
    open_dashboard,
    reached,
    required_address,
    say,
    status_line,
)

if TYPE_CHECKING:
    from bigtrain.jobs.cluster.dashboard import Dashboard
    from bigtrain.jobs.cluster.package import Request
    from bigtrain.jobs.cluster.submission import Submission
    from bigtrain.jobs.cluster.views import ClusterView
    from bigtrain.jobs.config import JobConfig
    from bigtrain.jobs.scripts.call import ScriptCall
    from bigtrain.run import RunDirectory

app = typer.Typer()

LauncherOption = Annotated[
    str, typer.Option("--launcher", help='What the script is written for: "accelerate --mixed_precision bf16".')
]
EnvOption = Annotated[
    list[str] | None,
    typer.Option(
        "--env", metavar="NAME=VALUE", help="Environment variable for the ranks; NAME alone takes its value here."
    ),
]

ScriptOption = Annotated[
    str | None, typer.Option(help="Submit this script instead of a run's YAML; its arguments follow --.")
]
FollowOption = Annotated[
    bool, typer.Option("--follow", help="Show the run until it ends; Ctrl-C stops only the display.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print what would be submitted, and exit.")
]
ScriptProcsOption = Annotated[int | None, typer.Option(min=1, help="With --script: number of ranks on each node.")]


@app.command(cls=ScriptCommand)
def submit(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help="A run's YAML.")] = None,
    overrides: Overrides = None,
    name: RunName = None,
    address: Address = None,
    token_file: TokenFile = None,
    follow: FollowOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the run ends, and exit with its code.")] = False,
    dry_run: DryRunOption = False,
    max_duration: Annotated[str | None, typer.Option(metavar="D", help='Stop after "2 h"; it can be resumed.')] = None,
    secrets_file: Annotated[
        Path | None, typer.Option(help="Secret keys for the ranks: a file or a mounted Secret, on the nodes.")
    ] = None,
    script: ScriptOption = None,
    module: Annotated[bool, typer.Option("--module", help="--script names a module, as python -m does.")] = False,
    launcher: LauncherOption = "torchrun",
    env: EnvOption = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="With --script: number of nodes.")] = None,
    procs_per_node: ScriptProcsOption = None,
    working_dir: Annotated[Path | None, typer.Option(help="With --script: directory of source code to ship.")] = None,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Start a run on a Ray cluster; it continues when this command ends. The same name resumes it."""
    began = time.time()
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.jobs.environment import parse_environment
        from bigtrain.jobs.scripts.call import ScriptCall
        from bigtrain.jobs.scripts.launch import job_config

        variables = parse_environment(env, os.environ)
        make = request_maker(began, secrets_file, max_duration, {} if script is not None else variables)
        if script is not None:
            words = [*([config] if config is not None else []), *(overrides or [])]
            job, arguments = script_words(words, after_dashes(context))
            call = ScriptCall(script, arguments, module=module, environment=variables)
            _note_launcher(call, launcher)
            job_section = job_config(job, nodes, procs_per_node)
            submission = _of_script(call, launcher, name, job_section, working_dir, make, runs_dir)
        elif config is None:
            raise UserError("There is nothing to submit", "CONFIG", "Name a run's YAML, or a script with --script.")
        elif nodes is not None or procs_per_node is not None or working_dir is not None or module:
            raise UserError(
                "--nodes, --procs-per-node, --working-dir and --module need --script",
                fix="Write job.nodes=N job.procs_per_node=P.",
            )
        else:
            from bigtrain.jobs.cluster.submission import of_config

            words = [*(overrides or []), *after_dashes(context)]
            submission = of_config(load(Path(config), words, name, plugin), runs_dir.absolute(), make)
        dashboard = open_dashboard(required_address(address), token_file)
        code = send(dashboard, submission, dry_run, follow, wait, as_json)
    raise typer.Exit(code)


def request_maker(
    began: float, secrets_file: Path | None, max_duration: str | None, environment: dict[str, str] | None = None
) -> Callable[..., Request]:
    """A function that builds the request of a submission from its name and directory of runs.

    Args:
        began: Time of the submission in seconds since the epoch.
        secrets_file: Path of a file with secrets on the nodes.
        max_duration: The value of --max-duration.
        environment: Environment variables for the ranks.

    Raises:
        UserError: `max_duration` is not a time.
    """
    from bigtrain.config import Duration, UserError
    from bigtrain.jobs.cluster.package import Request, versions

    seconds = None
    if max_duration is not None:
        try:
            duration = Duration.parse(max_duration)
        except ValueError as error:
            raise UserError(str(error), "--max-duration", 'Write a time: "90 min", "2 h".') from None
        if not duration.is_time:
            raise UserError(f"'{max_duration}' is not a duration", "--max-duration", 'Write "90 min", or "2 h".')
        seconds = duration.seconds

    def make(name: str, runs_dir: Path, plugin: str | None = None) -> Request:
        secrets = None if secrets_file is None else str(secrets_file)
        return Request(
            "", name, str(runs_dir), began, versions(), secrets, seconds, plugin, environment=environment or {}
        )

    return make


def _note_launcher(call: ScriptCall, launcher: str) -> None:
    """Print a note if a script seems to be written for another launcher."""
    from bigtrain.jobs.scripts.launcher import notes

    if not call.module and Path(call.file).is_file():
        for line in notes(Path(call.file).read_text(errors="replace"), launcher):
            say(line)


def _of_script(
    call: ScriptCall,
    launcher: str,
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
        raise UserError("A script needs a valid name", "--name", "Use letters, digits, '.', '_' and '-'.")
    return of_script(call, directory, job, launcher, lambda: make(name, runs_dir.absolute()))


def send(dashboard: Dashboard, submission: Submission, dry_run: bool, follow: bool, wait: bool, as_json: bool) -> int:
    """Check a submission against the cluster, send it, and wait or follow as the options request.

    Args:
        dashboard: The cluster.
        submission: The submission.
        dry_run: Whether to only check and print what would be submitted.
        follow: Whether to show the driver's output until the run ends.
        wait: Whether to wait until the run ends.
        as_json: Whether to print the result as JSON.

    Returns:
        The exit code of the command: with `follow` or `wait` that of the run.
    """
    from dataclasses import replace

    from bigtrain.jobs.cluster.submission import check_capacity, check_fits, check_versions, next_id, see_off

    with reached(dashboard):
        request = submission.request
        check_versions(dashboard, request.versions)
        dashboard.require_authentication()
        lacking = None if request.resume else check_capacity(dashboard, submission.job)
        if submission.config is not None:
            check_fits(dashboard, submission.config)
        id = next_id(dashboard, request.name)
        submission = replace(submission, request=replace(request, id=id))
        result: dict[str, Any] = {"submission": id, "name": request.name, "address": dashboard.url}
        if dry_run:
            shipped = sum(len(data) for _, data in submission.files) + len(submission.source.data)
            result |= {"nodes": submission.job.nodes, "procs_per_node": submission.job.procs_per_node}
            show({**result, "bytes": shipped, "waits_for": lacking}, as_json, _would)
            return 0
        if lacking is not None:
            say(f"{request.name} has to wait: {lacking}")
        view = submission.send(dashboard)
        sent = time.time()
        say(f"{request.name}: submitted as {id}")
        if follow:
            return _follow(view)
        code = see_off(view)
        if code is not None:
            return _ended(view, code, as_json)
        board = view.board() or {}
        for line in board.get("notes", []):
            say(line)
        if wait:
            code = _wait(view)
            if code in (1, 2):
                for line in driver_lines(iter([view.driver_log()])):
                    say(line)
            show({**result, "exit_code": code}, as_json, lambda _: _end_line(view))
            return code
        show(
            {**result, "times": board.get("times", {}) | {"sent": sent}},
            as_json,
            lambda _: _how_to_follow(view, dashboard),
        )
    return 0


def _would(result: dict[str, Any]) -> str:
    waits = f"\nit would have to wait: {result['waits_for']}" if result["waits_for"] else ""
    return (
        f"would submit {result['submission']} to {result['address']}: {result['nodes']} nodes x "
        f"{result['procs_per_node']} processes, {result['bytes'] / 1e6:.2f} MB of source{waits}"
    )


def _how_to_follow(view: ClusterView, dashboard: Dashboard) -> str:
    return (
        f"the run has started; see `bigtrain status {view.name}` and `bigtrain logs {view.name} -f`, --address "
        f"{dashboard.url}"
    )


def _follow(view: ClusterView) -> int:
    from bigtrain.jobs.cluster.views import exit_code

    try:
        for line in driver_lines(view.follow_driver()):
            say(line)
    except KeyboardInterrupt:
        say(f"detached; {view.name} continues: `bigtrain status {view.name}`")
        return DETACHED
    view.refresh()
    return exit_code(view.job, view.board())


def _wait(view: ClusterView) -> int:
    from bigtrain.jobs.cluster.dashboard import GONE_S
    from bigtrain.jobs.cluster.views import wait_for_end

    try:
        return wait_for_end(view, GONE_S)
    except KeyboardInterrupt:
        say(f"detached; {view.name} continues: `bigtrain status {view.name}`")
        return DETACHED


def _ended(view: ClusterView, code: int, as_json: bool) -> int:
    """Show why a job ended before its ranks ran; returns its exit code."""
    error = (view.board() or {}).get("error")
    if as_json and error:
        print(json.dumps(error))
    else:
        for line in driver_lines(iter([view.driver_log()])):
            say(line)
        if code and not error:
            say(f"{view.name}: {view.job.message}")
    return code


def _end_line(view: ClusterView) -> str:
    return status_line(view.status())


@app.command("run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
def run_here(
    words: Annotated[list[str], typer.Argument(metavar="[job.KEY=VALUE]... SCRIPT [ARGS]...")],
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks on this machine; default: one per GPU.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes of this Slurm job.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the script's.")] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT names a module, as python -m does.")] = False,
    launcher: LauncherOption = "torchrun",
    env: EnvOption = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Run your own script on this machine, like torchrun, with restarts, logs and `bigtrain stop`."""
    with errors():
        from bigtrain.jobs.scripts.launch import job_config

        before = list(itertools.takewhile(lambda word: word.startswith("job.") and "=" in word, words))
        call = _call_here(words[len(before) :], module, env)
        _note_launcher(call, launcher)
        from bigtrain.jobs.scripts.run import run_script

        run = _script_directory(call, name, runs_dir)
        code = run_script(call, run, job_config(before, nodes, nproc), launcher, say=say)
    raise typer.Exit(int(code))


def _call_here(words: list[str], module: bool, env: list[str] | None) -> ScriptCall:
    from bigtrain.config import UserError
    from bigtrain.jobs.environment import parse_environment
    from bigtrain.jobs.scripts.call import ScriptCall

    if not words or (not module and not Path(words[0]).is_file()):
        what = f"There is no script {words[0]}" if words else "No script is named"
        raise UserError(what, "SCRIPT", "Write options of `bigtrain run` and job.KEY=VALUE before SCRIPT.")
    environment = parse_environment(env, os.environ)
    return ScriptCall(words[0], words[1:], str(Path.cwd()), module, environment=environment)


def _script_directory(call: ScriptCall, name: str | None, runs_dir: Path) -> RunDirectory:
    """The run directory of a script on this machine."""
    import re

    from bigtrain.config import UserError
    from bigtrain.run import NAME_PATTERN, RunDirectory

    found = name or (call.file if call.module else Path(call.file).stem)
    if not re.match(NAME_PATTERN, found):
        raise UserError(f"'{found}' cannot be the name of a run", "--name", "Use letters, digits, '.', '_' and '-'.")
    return RunDirectory((runs_dir / found).absolute())
