"""Runs on a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bigtrain import variables
from bigtrain.api.config import Overrides, read_config
from bigtrain.config import UserError
from bigtrain.jobs.cluster import submission
from bigtrain.jobs.cluster.dashboard import Dashboard
from bigtrain.jobs.cluster.package import Request, versions
from bigtrain.run import ExitCode

if TYPE_CHECKING:
    from bigtrain.jobs.cluster.views import ClusterView
    from bigtrain.run import RunConfig

LOOK_S: Final = 1.0


class ClusterRun:
    """A run that was submitted to a cluster; this object may go away while it runs."""

    def __init__(self, dashboard: Dashboard, view: ClusterView) -> None:
        self._dashboard, self._view = dashboard, view

    @property
    def name(self) -> str:
        """Its name."""
        return self._view.name

    def status(self) -> dict[str, Any]:
        """What `bigtrain status NAME --address ... --json` prints."""
        return self._view.status()

    def events(self) -> list[dict[str, Any]]:
        """Starts, saves, faults, stops and the end, oldest first."""
        return self._view.events()

    def wait(self, timeout_s: float | None = None) -> ClusterRun:
        """Wait until the run has ended.

        Raises:
            TimeoutError: It is still under way after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._view.active():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"The run '{self.name}' is still under way after {timeout_s:g} s")
            time.sleep(LOOK_S)
        return self

    def stop(self, now: bool = False) -> None:
        """Let the run save itself and end; it can be resumed."""
        submission.stop(self._dashboard, self.name, now)


def submit(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Overrides = None,
    *,
    address: str | None = None,
    name: str | None = None,
    runs_dir: str | os.PathLike[str] = "runs",
    token_file: str | os.PathLike[str] | None = None,
    secrets_file: str | None = None,
    plugin: str | os.PathLike[str] | Iterable[str] | None = None,
) -> ClusterRun:
    """Start a run on a Ray cluster, as `bigtrain submit` does. The same name resumes it.

    Args:
        address: URL of the cluster's dashboard; by default the variable BIGTRAIN_ADDRESS.
        runs_dir: On the nodes: a directory that all of them share.
        token_file: The cluster's token, mode 0600; by default as Ray finds it.
        secrets_file: Keys for the ranks: a file on the nodes.

    Raises:
        UserError: Anything that is wrong in the config, or a cluster that does not answer.
    """
    place = address or os.environ.get(variables.ADDRESS)
    if not place:
        raise UserError("No cluster is named", "address", "Give address='http://HOST:8265' or set BIGTRAIN_ADDRESS.")
    began = time.time()

    def request(name: str, runs_dir: Path, plugin: str | None = None) -> Request:
        return Request("", name, str(runs_dir), began, versions(), secrets_file, None, plugin, environment={})

    resolved = read_config(config, overrides, name=name, plugin=plugin)
    prepared = submission.of_config(resolved, Path(runs_dir).absolute(), request)
    dashboard = Dashboard(place, None if token_file is None else Path(token_file))
    submission.check_versions(dashboard, prepared.request.versions)
    dashboard.require_authentication()
    submission.check_capacity(dashboard, prepared.job)
    numbered = replace(prepared.request, id=submission.next_id(dashboard, resolved.name))
    view = replace(prepared, request=numbered).send(dashboard)
    if submission.see_off(view) == ExitCode.USER:
        raise UserError(f"The run '{resolved.name}' was refused on the cluster: {view.driver_log().decode().strip()}")
    return ClusterRun(dashboard, view)
