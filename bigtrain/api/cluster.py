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
    """A run on a Ray cluster. The run continues if this object is deleted or this process ends."""

    def __init__(self, dashboard: Dashboard, view: ClusterView) -> None:
        self._dashboard, self._view = dashboard, view

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._view.name

    def status(self) -> dict[str, Any]:
        """State, step, loss, speed, goodput and more: the output of `bigtrain status NAME --address ... --json`."""
        return self._view.status()

    def events(self) -> list[dict[str, Any]]:
        """The run's events (starts, saves, faults, stops, end), oldest first."""
        return self._view.events()

    def wait(self, timeout_s: float | None = None) -> ClusterRun:
        """Wait until the run has ended.

        Args:
            timeout_s: Longest wait in seconds; None: no limit.

        Returns:
            The run itself.

        Raises:
            TimeoutError: The run is still active after `timeout_s` seconds.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._view.active():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"The run '{self.name}' has not ended after {timeout_s:g} s")
            time.sleep(LOOK_S)
        return self

    def stop(self, now: bool = False) -> None:
        """Make the run save a checkpoint and end; it can be resumed.

        Args:
            now: End the run at once, without saving; it resumes from its last checkpoint.
        """
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
    """Start a run on a Ray cluster, as `bigtrain submit` does. A run of this name that exists is resumed.

    Args:
        config: The path of a YAML file, the same keys as a mapping, or a `RunConfig`.
        overrides: Values that replace keys of the config: {"optimizer.lr": 3e-4}.
        address: URL of the cluster's dashboard; None: the environment variable BIGTRAIN_ADDRESS.
        name: Name of the run, instead of the config's.
        runs_dir: The directory of the runs on the nodes, which all nodes must share.
        token_file: File with the cluster's authentication token, mode 0600; None: the token that Ray finds.
        secrets_file: Path, on the nodes, of a file with API keys for the ranks; see `bigtrain.keys`.
        plugin: Your own code, one or several values of `--plugin`.

    Returns:
        The started run.

    Raises:
        UserError: The config has an error, no cluster is given, or the cluster does not answer or refuses the run.
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
