"""`bigtrain submit`: checks a job on the client, uploads source and config, and starts the driver on the cluster."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bigtrain import variables
from bigtrain.config import UserError, yaml_file
from bigtrain.config.plugin import active_plugin
from bigtrain.jobs.cluster.dashboard import GONE_S, Dashboard, DashboardGone
from bigtrain.jobs.cluster.package import (
    CONFIG_NAME,
    REQUEST_NAME,
    WORK_NAME,
    Package,
    Request,
    Script,
    directory_archive,
    make_package,
    plugin_files,
    source_package,
    versions,
    work_archive,
)
from bigtrain.jobs.cluster.views import NAME_KEY, ClusterView, cluster_view, cluster_views, exit_code
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.jobs.scripts.launch import refuse_resume
from bigtrain.jobs.scripts.launcher import adapt
from bigtrain.planning.check import check_memory_of_nodes
from bigtrain.run import RunConfig

SAVE_MARGIN_S: Final = 120
POLL_S: Final = 0.2
RUNS_DIR_KEY: Final = "bigtrain_runs_dir"
SCRIPT_KEY: Final = "bigtrain_script"
"""Key of the user's own script in a Ray job's metadata."""

_ENDER = Path(__file__).with_name("end_driver.py")


@dataclass(frozen=True)
class Submission:
    """A job that is ready to be submitted."""

    request: Request
    job: JobConfig
    source: Package
    files: list[tuple[str, bytes]]
    config: RunConfig | None = None
    """The run's config; None for a script, and for a run that resumes with its recorded config."""

    def send(self, dashboard: Dashboard) -> ClusterView:
        """Upload the packages that the cluster does not have yet, and start the driver."""
        directory = make_package([*self.files, (REQUEST_NAME, self.request.dump())])
        for package in (self.source, directory):
            if not dashboard.has_package(package.name):
                dashboard.put_package(package.name, package.data)
        # Ray Jobs' stop waits this long for the ranks to save; its default is 3 s.
        limits = self.job.limits
        ending_s = limits.save + limits.step if self.request.script is None else self.job.script.stop
        wait_s = int(ending_s + SAVE_MARGIN_S)
        environment = {variables.SUBMISSION: self.request.id, "RAY_JOB_STOP_WAIT_TIME_S": str(wait_s)}
        runtime_env = {"working_dir": directory.uri, "py_modules": [self.source.uri], "env_vars": environment}
        metadata = {NAME_KEY: self.request.name, RUNS_DIR_KEY: self.request.runs_dir}
        if self.request.script is not None:
            metadata[SCRIPT_KEY] = self.request.script.name
        if self.request.doctor:
            metadata = {}  # The examination is not a run.
        dashboard.submit(self.request.id, "exec python -m bigtrain.jobs.cluster.driver", runtime_env, metadata)
        return ClusterView(dashboard, dashboard.job(self.request.id), self.request.name)


def of_config(config: RunConfig, runs_dir: Path, request: Callable[..., Request]) -> Submission:
    """The submission of a run.

    Args:
        config: The run's config.
        runs_dir: Directory of runs on the nodes.
        request: Builds the request from the run's name, `runs_dir` and the plugin.

    Raises:
        UserError: The layout does not allow the number of ranks, or two plugins have the same file name.
    """
    job = config.job
    if job.procs_per_node != "auto":
        try:
            config.layout.mesh(job.nodes * job.procs_per_node)
        except ValueError as error:
            raise UserError(str(error), fix="Change job.nodes, job.procs_per_node or the layout.") from None
    plugin = active_plugin()
    name, files = plugin_files(plugin.place) if plugin is not None else (None, [])
    files = [*files, (CONFIG_NAME, yaml_file.dump(config.plain()).encode())]
    return Submission(request(config.name, runs_dir, plugin=name), job, source_package(), files, config)


def of_script(
    call: ScriptCall, directory: Path | None, job: JobConfig, launcher: str, make: Callable[[], Request]
) -> Submission:
    """The submission of a user's own script.

    Args:
        call: How the script is called from this working directory.
        directory: The directory that is shipped and becomes the working directory; None: only the script is shipped.
        job: The `job` section.
        launcher: The launcher for which the script is written, with options; see `bigtrain.jobs.scripts.launcher`.
        make: Builds the request without the script.

    Raises:
        UserError: The script does not exist or is not in the directory, the directory is too large, or an option of
            the launcher is not supported.
    """
    here = Path.cwd() if directory is None else directory.resolve()
    digest = None
    if call.module:
        name, archive = call.file, None if directory is None else directory_archive(directory)
    else:
        path = Path(call.file)
        if not path.is_file():
            raise UserError(f"There is no script {path}", "--script")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if directory is None:
            name, archive = path.name, work_archive(path.parent, [path])
        elif path.resolve().is_relative_to(here):
            name, archive = str(path.resolve().relative_to(here)), directory_archive(directory)
            call = replace(call, file=name)
        else:
            raise UserError(f"{path} is not in {directory}", "--working-dir")
    procs = 0 if job.procs_per_node == "auto" else job.procs_per_node
    call = adapt(replace(call, directory=str(here)), launcher, job.nodes, procs or 2)
    request = replace(make(), script=Script(name, call, digest), job=job.plain())
    return Submission(request, job, source_package(), [] if archive is None else [(WORK_NAME, archive)])


def of_resume(
    dashboard: Dashboard, name: str, runs_dir: Path | None, make: Callable[..., Request], step: int | None
) -> Submission:
    """The submission that resumes a run with its recorded config.

    Args:
        dashboard: The cluster.
        name: Name of the run.
        runs_dir: Directory of runs on the nodes; None: the one of the run's last submission.
        make: Builds the request from the run's name and directory of runs.
        step: If not None, the run goes back to the checkpoint of this step.

    Raises:
        UserError: `runs_dir` is None and the cluster does not remember the run, or the run is a script.
    """
    view = next((view for view in cluster_views(dashboard) if view.name == name), None)
    if view is not None and SCRIPT_KEY in view.job.metadata:
        raise refuse_resume(name, dashboard.url)
    if runs_dir is None:
        runs_dir = Path(cluster_view(dashboard, name).job.metadata[RUNS_DIR_KEY])
    request = replace(make(name, runs_dir), resume=True, step=step)
    return Submission(request, JobConfig(), source_package(), [])


def next_id(dashboard: Dashboard, name: str) -> str:
    """The id of the next submission of a run: NAME-NUMBER.

    Raises:
        UserError: The run is active on the cluster already.
    """
    attempts = [-1]
    for job in dashboard.jobs():
        if job.metadata.get(NAME_KEY) != name:
            continue
        if job.active:
            raise UserError(
                f"The run '{name}' is on the cluster already, as {job.id}",
                dashboard.url,
                f"Follow it with `bigtrain logs {name} -f`, or stop it with `bigtrain stop {name}`.",
            )
        number = job.id.rpartition("-")[2]
        attempts.append(int(number) if number.isdigit() else -1)
    return f"{name}-{max(attempts) + 1}"


def check_versions(dashboard: Dashboard, client: dict[str, str]) -> None:
    """Refuse a cluster whose version of Ray or Python differs from the local one.

    Raises:
        UserError: The versions differ in more than the patch number.
    """
    ray, python = dashboard.versions()
    # A client needs no Ray. If Ray is installed and its version differs, the environments differ.
    for name, here, there in (("Ray", client.get("ray", ray), ray), ("Python", client["python"], python)):
        if here.split(".")[:2] != there.split(".")[:2]:
            raise UserError(
                f"{name} is {there} on the cluster and {here} here",
                dashboard.url,
                f"Submit from an environment with {name} {there}, or change the cluster's image.",
            )


def check_capacity(dashboard: Dashboard, job: JobConfig) -> str | None:
    """Check whether the cluster can ever run a job.

    Returns:
        What the job has to wait for; None if the cluster has enough nodes.

    Raises:
        UserError: The cluster has too few nodes that are large enough, and no autoscaler adds nodes.
    """
    nodes = [node for node in dashboard.nodes() if all(node["labels"].get(k) == v for k, v in job.labels.items())]
    gpus = any(node["resources_total"].get("GPU") for node in nodes)
    procs = 1 if job.procs_per_node == "auto" else job.procs_per_node

    def fits(node: dict[str, Any]) -> bool:
        resources = node["resources_total"]
        return resources.get("CPU", 0) >= procs and (not gpus or resources.get("GPU", 0) >= procs)

    able = sum(map(fits, nodes))
    if able >= job.nodes:
        return None
    what = f"{procs} {'GPU' if gpus else 'CPU'}{'s' if procs > 1 else ''}"
    labelled = f" and the labels {job.labels}" if job.labels else ""
    found = f"{able} of the cluster's nodes have {what}{labelled}, but the job needs {job.nodes}"
    if able < job.least_nodes and not dashboard.has_autoscaler():
        offered = ", ".join(sorted({_offer(node) for node in nodes})) or "none with these labels"
        raise UserError(
            f"The job can never run there: {found}",
            dashboard.url,
            f"Request nodes that the cluster has, since it has no autoscaler: {offered}.",
        )
    return found


def check_fits(dashboard: Dashboard, config: RunConfig) -> None:
    """Refuse a run that does not fit into the memory of the cluster's accelerators.

    The driver, which can read the data, checks the memory again and more exactly.

    Raises:
        UserError: The memory is too small; the message names the term to reduce.
    """
    job = config.job
    nodes = [
        node["resources_total"]
        for node in dashboard.nodes()
        if all(node["labels"].get(key) == value for key, value in job.labels.items())
    ]
    if job.procs_per_node != "auto":
        check_memory_of_nodes(config, None, job.nodes * job.procs_per_node, nodes)


def _offer(node: dict[str, Any]) -> str:
    resources = node["resources_total"]
    parts = [f"{resources[kind]:g} {kind}" for kind in ("GPU", "CPU") if resources.get(kind)]
    return f"{node['node_ip']} with {' and '.join(parts) or 'nothing'}"


def see_off(view: ClusterView) -> int | None:
    """Wait until the driver has checked the job and has requested its nodes.

    Returns:
        The exit code if the job has ended by then; None if it runs or waits for nodes.

    Raises:
        DashboardGone: The dashboard was unreachable for longer than GONE_S.
    """
    heard = time.monotonic()
    while True:
        try:
            job = view.refresh()
            board = view.board() or {}
        except DashboardGone:
            if time.monotonic() - heard > GONE_S:
                raise
        else:
            heard = time.monotonic()
            if not job.active:
                return exit_code(job, board)
            if board.get("phase") in ("placed", "waiting"):
                return None
        time.sleep(POLL_S)


def stop(dashboard: Dashboard, name: str, now: bool) -> str:
    """Stop a run and wait until it has ended; see `bigtrain.jobs.stop`.

    Raises:
        UserError: The run is not running.
    """
    view = cluster_view(dashboard, name)
    if not view.job.active:
        raise UserError(f"The run '{name}' is not running", dashboard.url)
    if now:
        _end_driver(dashboard, view.job.id)
    else:
        dashboard.stop(view.job.id)
    while view.active():
        time.sleep(POLL_S)
    state = view.status()["state"]
    again = f"`bigtrain resume {name}` resumes it"
    if SCRIPT_KEY in view.job.metadata:
        again = "submit it again with its arguments to start it again"
    return f"{name}: {state}; {again}"


def examine(
    dashboard: Dashboard, runs_dir: str, secrets_file: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the checks of `bigtrain doctor` on the cluster; returns `bigtrain.jobs.cluster.doctor.result`.

    Raises:
        UserError: The cluster's versions differ, it needs no token, or the job that runs the checks fails.
    """
    known = versions()
    check_versions(dashboard, known)
    dashboard.require_authentication()
    id = f"bigtrain-doctor-{time.time_ns() // 1_000_000}"
    request = Request(id, id, runs_dir, time.time(), known, secrets_file, doctor=True)
    view = Submission(request, JobConfig(), source_package(), []).send(dashboard)
    say("waiting for the answers of the nodes")
    while view.active():
        time.sleep(POLL_S)
    found = (view.board() or {}).get("result")
    if not isinstance(found, dict):
        raise UserError(f"The nodes could not be examined: {view.job.message}", dashboard.url)
    return found


def _end_driver(dashboard: Dashboard, id: str) -> None:
    """End a driver at once: a small job sends it two signals, because Ray Jobs' stop sends only one."""
    ender = f"{id}-now-{time.time_ns() // 1_000_000}"
    dashboard.submit(ender, f"exec python -c {shlex.quote(_ENDER.read_text())} {shlex.quote(id)}", {}, {})
    while dashboard.job(ender).active:
        time.sleep(POLL_S)
