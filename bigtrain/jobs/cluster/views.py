"""Views of a run from outside: on this machine by its run directory, on a cluster only through the dashboard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from bigtrain.config import UserError, nearest
from bigtrain.jobs.cluster.board import board_path
from bigtrain.jobs.cluster.dashboard import Dashboard, DashboardGone, NotThere, RayJob
from bigtrain.run import ExitCode, Lease, RunDirectory
from bigtrain.run.names import EVENTS, LOGS
from bigtrain.storage import read_lines
from bigtrain.tracking.status import status as read_status

LOOK_S: Final = 0.2
WAIT_S: Final = 1.0
NAME_KEY: Final = "bigtrain_run"
"""Key of the run's name in a Ray job's metadata."""

_LOG = re.compile(r"attempt_(\d+)/rank_(\d+)\.log$")
_STATES: Final = {0: "finished", 75: "stopped"}


class RunView(Protocol):
    """A read-only view of a run from outside."""

    name: str

    def status(self) -> dict[str, Any]:
        """The object that `bigtrain status --json` prints."""
        ...

    def events(self) -> list[dict[str, Any]]:
        """The objects of the run's events.jsonl."""
        ...

    def active(self) -> bool:
        """Whether the run may still write."""
        ...

    def attempts(self, rank: int) -> list[int]:
        """Numbers of the attempts that have a log of this rank, in ascending order."""
        ...

    def read(self, attempt: int, rank: int) -> bytes:
        """The current content of a rank's log."""
        ...

    def follow(self, attempt: int, rank: int, over: Callable[[], bool]) -> Iterator[bytes]:
        """Yield a rank's log as it grows, until `over` returns True and everything is read."""
        ...


class LocalView:
    """A run on this machine."""

    def __init__(self, run: RunDirectory) -> None:
        self.name = run.name
        self._run = run

    def status(self) -> dict[str, Any]:
        """See `RunView`."""
        return read_status(self._run.path, alive=self.active())

    def events(self) -> list[dict[str, Any]]:
        """See `RunView`."""
        return list(read_lines(self._run.events))

    def active(self) -> bool:
        """See `RunView`."""
        holder = Lease.holder(self._run)
        return holder is not None and holder.alive()

    def attempts(self, rank: int) -> list[int]:
        """See `RunView`."""
        return _attempts([str(path) for path in self._run.logs.glob(f"attempt_*/rank_{rank}.log")])

    def read(self, attempt: int, rank: int) -> bytes:
        """See `RunView`."""
        return self._path(attempt, rank).read_bytes()

    def follow(self, attempt: int, rank: int, over: Callable[[], bool]) -> Iterator[bytes]:
        """See `RunView`."""
        with open(self._path(attempt, rank), "rb") as log:
            while True:
                last = over()
                if chunk := log.read():
                    yield chunk
                if last:
                    return
                time.sleep(LOOK_S)

    def _path(self, attempt: int, rank: int) -> Path:
        return self._run.logs / f"attempt_{attempt}" / f"rank_{rank}.log"


class ClusterView:
    """A run that was submitted to a cluster, seen through the cluster's dashboard."""

    def __init__(self, dashboard: Dashboard, job: RayJob, name: str) -> None:
        self.name = name
        self.job = job
        self.refused: ClusterView | None = None
        """The newest submission of the run, if it ended before it requested nodes and is not this one."""
        self.submissions = [job.id]
        """Ids of all submissions of the run that the cluster remembers, the newest last."""
        self._dashboard = dashboard

    def began(self) -> bool:
        """Whether this submission is active, or has reached the point where it requests nodes."""
        return self.job.active or "placing" in (self.board() or {}).get("times", {})

    def submission(self, which: str) -> ClusterView:
        """The view of another submission of the same run.

        Args:
            which: Id or number of the submission, such as "mine-2" or "2".

        Raises:
            UserError: The cluster remembers no such submission.
        """
        wanted = f"{self.name}-{which}" if which.isdigit() else which
        if wanted not in self.submissions:
            known = ", ".join(self.submissions)
            raise UserError(f"There is no submission {wanted}", "--submission", f"Choose one of: {known}.")
        return ClusterView(self._dashboard, self._dashboard.job(wanted), self.name)

    def refresh(self) -> RayJob:
        """Fetch the current state of the Ray job."""
        self.job = self._dashboard.job(self.job.id)
        return self.job

    def board(self) -> dict[str, Any] | None:
        """The content of the driver's status.json; None if it does not exist yet."""
        if self.job.node is None:
            return None
        try:
            value = json.loads(self._file("status.json"))
        except (NotThere, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def status(self) -> dict[str, Any]:
        """See `RunView`."""
        job, board = self.refresh(), self.board() or {}
        status = board.get("status") or _unknown(self.name)
        if not job.active:
            code = exit_code(job, board)
            status |= {"state": _STATES.get(code, "failed"), "eta_s": None}
        elif board.get("phase") == "waiting":
            status |= {"state": "waiting", "eta_s": None}
        elif board.get("phase") == "placed":
            status |= {"state": "running"}
        else:
            status |= {"state": "pending"}
        refused = None
        if self.refused is not None:
            error = (self.refused.board() or {}).get("error") or {}
            refused = {"submission": self.refused.job.id, "error": error.get("error")}
        return {**status, "submission": job.id, "refused": refused}

    def events(self) -> list[dict[str, Any]]:
        """See `RunView`."""
        if self.job.node is None:
            return []
        try:
            lines = self._file(f"run/{EVENTS}").splitlines(keepends=True)
        except NotThere:
            return []
        return [json.loads(line) for line in lines if line.endswith(b"}\n")]

    def active(self) -> bool:
        """See `RunView`."""
        return self.refresh().active

    def attempts(self, rank: int) -> list[int]:
        """See `RunView`."""
        if self.job.node is None:
            return []
        return _attempts(self._dashboard.files(self.job.node, self._name(f"run/{LOGS}/attempt_*/rank_{rank}.log")))

    def read(self, attempt: int, rank: int) -> bytes:
        """See `RunView`."""
        return self._file(f"run/{LOGS}/attempt_{attempt}/rank_{rank}.log")

    def follow(self, attempt: int, rank: int, over: Callable[[], bool]) -> Iterator[bytes]:
        """See `RunView`."""
        assert self.job.node is not None  # Without a node there are no attempts.
        name = self._name(f"run/{LOGS}/attempt_{attempt}/rank_{rank}.log")
        return self._dashboard.follow(self.job.node, name, over)

    def follow_driver(self) -> Iterator[bytes]:
        """Yield the driver's output until the driver ends."""
        while self.refresh().node is None:
            if not self.job.active:
                return iter([self.driver_log()])
            time.sleep(LOOK_S)
        return self._dashboard.follow(self.job.node or "", f"job-driver-{self.job.id}.log", lambda: not self.active())

    def driver_log(self) -> bytes:
        """The driver's output so far."""
        return self._dashboard.job_log(self.job.id).encode()

    def _name(self, name: str) -> str:
        return f"{board_path(self.job.id)}/{name}"

    def _file(self, name: str) -> bytes:
        return self._dashboard.file(self.job.node or "", self._name(name))


def exit_code(job: RayJob, board: dict[str, Any] | None) -> int:
    """The run's exit code after the job has ended: from the driver's board, or else from Ray's state of the driver."""
    recorded = (board or {}).get("exit_code")
    if isinstance(recorded, int):
        return recorded
    if job.status == "STOPPED":
        return ExitCode.STOPPED
    return job.exit_code if job.exit_code in set(ExitCode) else ExitCode.FAILED


def cluster_views(dashboard: Dashboard) -> list[ClusterView]:
    """Views of all runs that the cluster remembers, sorted by name.

    Each view shows the newest submission that has requested nodes or is active. A newer submission that was refused, or
    had nothing to do, does not hide that view: it is the view's `refused`.
    """
    submissions: dict[str, list[RayJob]] = {}
    for job in dashboard.jobs():
        if NAME_KEY in job.metadata:
            submissions.setdefault(job.metadata[NAME_KEY], []).append(job)
    return [_of_submissions(dashboard, name, submissions[name]) for name in sorted(submissions)]


def _of_submissions(dashboard: Dashboard, name: str, jobs: list[RayJob]) -> ClusterView:
    """The view of a run that has these submissions, the newest last; see `cluster_views`."""
    newest = ClusterView(dashboard, jobs[-1], name)
    view, earlier = newest, jobs[:-1]
    while earlier and not view.began():
        view = ClusterView(dashboard, earlier.pop(), name)
    if not view.began():
        view = newest
    if view is not newest:
        view.refused = newest
    view.submissions = [job.id for job in jobs]
    return view


def cluster_view(dashboard: Dashboard, name: str) -> ClusterView:
    """The view of a run, by the run's name; see `cluster_views`.

    Raises:
        UserError: The cluster remembers no run of that name.
    """
    views = cluster_views(dashboard)
    for view in views:
        if view.name == name:
            return view
    names = [view.name for view in views]
    close = nearest(name, names)
    known = f"Choose one of: {', '.join(names)}." if names else "It has no runs."
    fix = f"Did you mean '{close}'?" if close else known
    raise UserError(f"The cluster has no run '{name}'", dashboard.url, fix)


def read_log(view: RunView, rank: int, attempt: int | None, follow: bool) -> Iterator[bytes]:
    """Yield a rank's log.

    Args:
        view: The run.
        rank: The rank.
        attempt: Number of the attempt; None: the newest and, with `follow`, all later ones.
        follow: Whether to follow the log until the attempt, or without `attempt` the run, ends.

    Raises:
        UserError: There is no such log.
    """
    found = view.attempts(rank)
    while follow and not found and view.active():
        time.sleep(WAIT_S)
        found = view.attempts(rank)
    if not found or (attempt is not None and attempt not in found):
        which = f"attempt {attempt} of " if attempt is not None and found else ""
        raise UserError(
            f"There is no log of {which}rank {rank} of '{view.name}'",
            fix=f"There are attempts {', '.join(map(str, found))}."
            if found
            else "See the run's history with `bigtrain events`.",
        )
    current = found[-1] if attempt is None else attempt
    if not follow:
        yield view.read(current, rank)
        return
    while True:
        yield from view.follow(current, rank, _superseded(view, current, rank))
        later = [number for number in view.attempts(rank) if number > current]
        if attempt is not None or not later:
            return
        current = later[0]


def _superseded(view: RunView, attempt: int, rank: int) -> Callable[[], bool]:
    return lambda: any(number > attempt for number in view.attempts(rank)) or not view.active()


def wait_for_end(view: ClusterView, gone_s: float) -> int:
    """Wait for the end of a job, even if the dashboard is unreachable for a while; returns the run's exit code.

    Raises:
        DashboardGone: The dashboard was unreachable for longer than `gone_s` seconds.
    """
    away_since = None
    while True:
        try:
            if not view.active():
                return exit_code(view.job, view.board())
            away_since = None
        except DashboardGone:
            now = time.monotonic()
            away_since = away_since or now
            if now - away_since > gone_s:
                raise
        time.sleep(WAIT_S)


def _attempts(paths: list[str]) -> list[int]:
    return sorted(int(match[1]) for path in paths if (match := _LOG.search(path)))


def _unknown(name: str) -> dict[str, Any]:
    known = dict.fromkeys(
        ("step", "loss", "tokens_per_s", "goodput", "nodes", "last_event", "eta_s", "wandb_url"), None
    )
    return {"name": name, "state": "pending", **known, "restarts": 0}
