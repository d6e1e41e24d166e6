"""The driver of a submission: `python -m bigtrain.jobs.cluster.driver` on the head node, in the shipped directory.

The driver does what `bigtrain train` does on one machine: it checks the config against the data, takes the run's
lease, and runs a controller, whose placer is Ray. It informs the client by a board (`bigtrain.jobs.cluster.board`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from bigtrain import variables
from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin, source_hash
from bigtrain.jobs.announce import say_start
from bigtrain.jobs.check import check_when_free
from bigtrain.jobs.cluster import doctor
from bigtrain.jobs.cluster.board import Board, board_path
from bigtrain.jobs.cluster.package import CONFIG_NAME, PLUGIN_DIRECTORY, REQUEST_NAME, Request, Script, versions
from bigtrain.jobs.cluster.workplace import place
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.controller import Controller
from bigtrain.jobs.ending import tell_end
from bigtrain.jobs.generation import Launch
from bigtrain.jobs.placer_kinds import PLACERS
from bigtrain.jobs.placing import PlacementRequest
from bigtrain.jobs.scripts.launch import check_directory, held, refuse_resume, script_environment, script_launch
from bigtrain.jobs.takeover import outlast
from bigtrain.jobs.train import node_sizes
from bigtrain.keys import load_secrets
from bigtrain.planning.check import check_memory_of_nodes
from bigtrain.run import ExitCode, RunConfig, RunDirectory, load_config
from bigtrain.tracking.live import LiveDisplay
from bigtrain.tracking.status import status as read_status

PLACER: Final = "ray"
"""The placer of all runs that the driver starts."""
OLDEST_TORCH: Final = (2, 11)


def main() -> int:
    """Run the job whose request is in the working directory; returns a value of ExitCode."""
    began = time.time()
    request = Request.load(Path(REQUEST_NAME))
    board = _connect(request)
    board.phase("submitted", request.submitted)
    board.phase("driver", began)
    board.phase("connected")
    try:
        _check_versions(request)
        if request.doctor:
            found = doctor.result(doctor.cluster_checks(Path(request.runs_dir), request.secrets_file, say))
            board.end(ExitCode.FINISHED, result=found)
            return ExitCode.FINISHED
        if request.secrets_file is not None:
            # The notification of the run's end needs the secrets too.
            os.environ[variables.SECRETS_FILE] = request.secrets_file
            load_secrets(os.environ)
        code = _script(request, request.script, board) if request.script is not None else _train(request, board)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        board.end(error.exit_code, error=error.as_json())
        return error.exit_code
    board.end(code)
    return code


def _connect(request: Request) -> Board:
    """Connect to Ray, and create the board in the log directory that the dashboard serves."""
    import ray

    ray.init(address="auto", log_to_driver=False, logging_level="warning")
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    return Board(logs / board_path(request.id), request.id)


def _check_versions(request: Request) -> None:
    client, here = request.versions, versions()
    torch = here.get("torch")
    if torch is None or tuple(int(part) for part in torch.split(".")[:2]) < OLDEST_TORCH:
        raise UserError(
            f"bigtrain needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, but the cluster has {torch or 'none'}",
            "the cluster's image",
        )
    if "torch" in client and _release(client["torch"]) != _release(torch):
        say(f"note: torch is {torch} on the cluster and {client['torch']} where the job was submitted")


def _release(version: str) -> str:
    """A version without its local part; the same torch release is built for CPUs and for several CUDA versions."""
    return version.partition("+")[0]


def say(line: str) -> None:
    """Print a line to the job's log."""
    print(line, file=sys.stderr, flush=True)


def _train(request: Request, board: Board) -> int:
    runs_dir = Path(request.runs_dir)
    run = check_when_free(_load(request, runs_dir), runs_dir, step=request.step, say=_waiting(board))
    if run.finished:
        say(f"The run '{run.directory.name}' is finished: {run.newest} steps. Nothing to do.")
        return ExitCode.FINISHED
    job = run.prepared.config.job
    procs = PLACERS[PLACER].procs(job)
    run = run.with_job(procs_per_node=procs)
    job = run.prepared.config.job
    _check_layout(run.prepared.config, job.nodes * procs)
    check_memory_of_nodes(run.prepared.config, run.prepared.outputs, job.nodes * procs, _resources(job))
    board.phase("checked")
    _check_keys(run.prepared.config.tracking.wandb, request, board)
    with run.held() as lease:
        say_start(run, job.nodes * procs, sys.stderr)
        environment = {variables.LEASE: str(lease.number), **request.environment, **run.environment}
        config = run.prepared.config
        launch = Launch("bigtrain.training.rank", [], procs, job.limits.by_phase())
        code = _control(
            request, board, run.directory, job, launch, environment,
            total_steps=run.prepared.total_steps, paths=_needed(config, request), sizes=node_sizes(config, procs),
        )  # fmt: skip
    if code == ExitCode.FINISHED:
        say(f"{run.directory.name}: finished")
    tell_end(run.directory, run.prepared.config, code, sys.stderr)
    return code


def _waiting(board: Board) -> Callable[[str], None]:
    """A function that reports, in the log and on the board, that the lease of another launcher must expire first."""

    def wait(line: str) -> None:
        say(line)
        board.note(line)
        board.phase("waiting")

    return wait


def _check_keys(wandb: str, request: Request, board: Board) -> None:
    """Check which nodes lack a key.

    Args:
        wandb: The value of `tracking.wandb`. With online, every node must have a W&B key. With auto, missing keys are
            only reported, in the background. With other values nothing is checked.
        request: The request, which names the secrets file.
        board: Receives a note for each missing key.

    Raises:
        UserError: `tracking.wandb` is online, and a node has no W&B key.
    """
    if wandb == "online":
        lacking = doctor.missing_keys(request.secrets_file)
        without = [name for name, keys in lacking.items() if "WANDB_API_KEY" in keys]
        if without:
            raise UserError(
                f"tracking.wandb is online, but there is no WANDB_API_KEY on {', '.join(without)}",
                "tracking.wandb",
                "Set it where the nodes are started, or name a file on the nodes with --secrets-file.",
            )
    elif wandb == "auto":

        def look() -> None:
            for name, keys in doctor.missing_keys(request.secrets_file).items():
                line = f"note: no {' and no '.join(keys)} on {name}"
                say(line)
                board.note(line)

        threading.Thread(target=look, name="keys", daemon=True).start()


def _load(request: Request, runs_dir: Path) -> RunConfig:
    """Load the plugins and the run's config: the shipped one, or for `resume` the one that the run recorded."""
    directory = RunDirectory(runs_dir / request.name)
    if request.plugin is not None:
        load_plugin(os.pathsep.join(_plugin_place(name, runs_dir) for name in request.plugin.split(os.pathsep)))
    if not request.resume:
        return load_config(Path(CONFIG_NAME))
    record = directory.read_record()
    if "script" in record["what"]:
        raise refuse_resume(request.name, directory.path)
    if request.plugin is None and "plugin" in record:
        load_plugin(record["plugin"]["place"])
    return load_config(directory.config)


def _plugin_place(name: str, runs_dir: Path) -> str:
    """The path at which every node finds a plugin, or the plugin's name if it is an installed module.

    A shipped plugin is copied to the directory of runs, which all nodes share, under the hash of its content.
    """
    shipped = Path(PLUGIN_DIRECTORY) / name
    if not shipped.exists():
        return name
    digest = source_hash(shipped)
    place = runs_dir / ".plugins" / digest[:16] / name
    if not place.exists():
        waiting = place.parent.with_name(f".{digest[:16]}.tmp-{os.getpid()}")
        waiting.mkdir(parents=True)
        copy = shutil.copytree if shipped.is_dir() else shutil.copyfile
        copy(shipped, waiting / name)
        with contextlib.suppress(OSError):  # Another submission has created it meanwhile.
            waiting.rename(place.parent)
        shutil.rmtree(waiting, ignore_errors=True)
    return str(place)


def _resources(job: JobConfig) -> list[dict[str, Any]]:
    """The resources of each living node that has the job's labels."""
    import ray

    return [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and all(node.get("Labels", {}).get(key) == value for key, value in job.labels.items())
    ]


def _check_layout(config: RunConfig, world_size: int) -> None:
    try:
        config.layout.mesh(world_size)
    except ValueError as error:
        raise UserError(str(error), fix="Change job.nodes, job.procs_per_node or the layout.") from None


def _needed(config: RunConfig, request: Request) -> list[Path]:
    """Local paths that every node must be able to read: shards, Hugging Face weights and the secrets file."""
    shards = [place for key in ("train", "validation") for place in config.data.places(key).values()]
    others = [getattr(config.model, "hf", None), request.secrets_file]
    return [Path(place) for place in (*shards, *others) if place is not None and "://" not in place]


def _script(request: Request, script: Script, board: Board) -> int:
    """Run a user's own script; returns a value of ExitCode."""
    directory = RunDirectory(Path(request.runs_dir) / request.name)
    check_directory(directory, script.name)
    job = JobConfig.model_validate(request.job)
    procs = PLACERS[PLACER].procs(job)
    outlast(directory, _waiting(board))
    board.phase("checked")
    _check_keys("auto", request, board)
    with held(directory, script.name):
        call, seen = place(script, directory)
        say(
            f"the script runs in {call.directory}"
            + ("" if seen else ", because not every node sees the directory that it was submitted from")
        )
        paths = [Path(path) for path in (request.secrets_file, call.directory) if path]
        launch = script_launch(call, job, procs)
        environment = script_environment(call, directory, job)
        code = _control(request, board, directory, job, launch, environment, paths=paths)
    if code == ExitCode.FINISHED:
        say(f"{directory.name}: finished")
    return code


def _control(
    request: Request,
    board: Board,
    directory: RunDirectory,
    job: JobConfig,
    launch: Launch,
    environment: dict[str, str],
    *,
    total_steps: int | None = None,
    paths: list[Path],
    sizes: list[int] | None = None,
) -> int:
    """Run the controller to the end of the run, and show the progress in the log and on the board."""
    if request.secrets_file is not None:
        environment = environment | {variables.SECRETS_FILE: request.secrets_file}
    board.link(directory.path)
    board.phase("placing")
    board.follow(lambda: read_status(directory.path, alive=True))
    display = LiveDisplay(directory.path, total_steps, sys.stderr)
    display.start()
    event = _shown(directory, board)
    try:
        legal = sizes or range(job.least_nodes, job.nodes + 1)
        request_of_nodes = PlacementRequest(job, directory.logs, display.say, launch.procs, legal, paths, event)
        placer = PLACERS[PLACER].of(request_of_nodes)
        controller = Controller(
            directory.path, placer, job, directory.name, event, say=display.say, launch=launch, environment=environment
        )
        with _limited(request.max_duration_s, controller, display.say):
            return controller.run()
    finally:
        display.stop()


def _shown(directory: RunDirectory, board: Board) -> Callable[..., None]:
    """A function that writes events to events.jsonl, and the phases `placed` and `waiting` also to the board."""

    def event(name: str, /, **fields: Any) -> None:
        if name in ("placed", "waiting"):
            board.phase(name)
        directory.event(name, **fields)

    return event


@contextlib.contextmanager
def _limited(seconds: float | None, controller: Controller, say: Callable[[str], None]) -> Iterator[None]:
    """While the context is active, request the run to stop after `seconds`; None: never."""
    if seconds is None:
        yield
        return

    def stop() -> None:
        say(f"--max-duration is reached: {seconds:g} s")
        controller.request_stop()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":
    sys.exit(main())
