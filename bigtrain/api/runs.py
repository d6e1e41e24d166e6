"""Train a run on this machine, and read its status, metrics and events during and after training."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bigtrain.api.config import Overrides, read_config
from bigtrain.children import module_command, with_source
from bigtrain.config import UserError
from bigtrain.run import ExitCode, RunDirectory, find_run

if TYPE_CHECKING:
    from bigtrain.run import RunConfig

RUNS_DIR: Final = "runs"
LOOK_S: Final = 0.2


class RunFailedError(RuntimeError):
    """A run ended with an error; the message contains the cause."""


class Run:
    """A run on this machine: active, stopped or finished.

    Args:
        run: Name of the run under `runs_dir`, or path of its directory.
        runs_dir: The directory that holds the runs.

    Raises:
        UserError: There is no such run; the message suggests the most similar name.
    """

    def __init__(self, run: str | os.PathLike[str], runs_dir: str | os.PathLike[str] = RUNS_DIR) -> None:
        self._directory = find_run(os.fspath(run), Path(runs_dir))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._directory.name

    @property
    def path(self) -> Path:
        """Directory of the run."""
        return self._directory.path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def config(self) -> RunConfig:
        """The resolved config of the run."""
        return read_config(self._directory.config)

    def status(self) -> dict[str, Any]:
        """State, step, loss, speed, goodput and more: the output of `bigtrain status --json`."""
        from bigtrain.jobs.cluster.views import LocalView

        return LocalView(self._directory).status()

    def metrics(self) -> list[dict[str, Any]]:
        """One row for each logged step, keyed by metric name; `pandas.DataFrame(run.metrics())` is the table."""
        from bigtrain.tracking.metrics import step_rows

        return list(step_rows(self._directory.metrics))

    def events(self) -> list[dict[str, Any]]:
        """The run's events (starts, saves, faults, stops, end), oldest first."""
        from bigtrain.storage import read_lines

        return list(read_lines(self._directory.events))

    def checkpoints(self) -> list[int]:
        """The steps of the published checkpoints, oldest first; the call does not verify them."""
        from bigtrain.checkpoint.commit import list_checkpoints

        return [found.step for found in list_checkpoints(self._directory.checkpoints)]

    def wait(self, timeout_s: float | None = None) -> Run:
        """Wait until no process trains the run.

        Args:
            timeout_s: Longest wait in seconds; None: no limit.

        Returns:
            The run itself.

        Raises:
            TimeoutError: The run is still active after `timeout_s` seconds.
            RunFailedError: The run was started by `train` in this process, and failed.
        """
        from bigtrain.run import Lease

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._is_active(Lease.holder(self._directory)):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"The run '{self.name}' has not ended after {timeout_s:g} s")
            time.sleep(LOOK_S)
        if self._process is not None and self._process.returncode not in (ExitCode.FINISHED, ExitCode.STOPPED):
            raise RunFailedError(f"The run '{self.name}' failed: {self._cause()}")
        return self

    def stop(self, now: bool = False) -> None:
        """Make the run save a checkpoint and end; it can be resumed. Returns when it has ended.

        Args:
            now: End the run at once, without saving; it resumes from its last checkpoint.

        Raises:
            UserError: The run is not active on this machine.
        """
        from bigtrain.jobs.stop import stop

        stop(self._directory, now)
        if self._process is not None:
            self._process.wait()

    def _is_active(self, holder: Any) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return holder is not None and holder.alive()

    def _cause(self) -> str:
        causes = [str(event["cause"]) for event in self.events() if event.get("event") in ("fault", "failed")]
        return causes[-1] if causes else "see its logs"


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Overrides = None,
    nproc: int | None = None,
    *,
    name: str | None = None,
    runs_dir: str | os.PathLike[str] = RUNS_DIR,
    plugin: str | os.PathLike[str] | Iterable[str] | None = None,
    wait: bool = True,
) -> Run:
    """Train a run on this machine, as `bigtrain train` does. An existing run resumes from its newest checkpoint.

    Args:
        config: The path of a YAML file, the same keys as a mapping, or a `RunConfig`.
        overrides: Values that replace keys of the config: {"optimizer.lr": 3e-4}.
        nproc: Number of processes; None: as the config's section `job` says.
        name: Name of the run, instead of the config's.
        runs_dir: The directory that holds the runs.
        plugin: Your own code, one or several values of `--plugin`.
        wait: True: return when the run has ended; Ctrl-C makes it save and stop. False: return when it has started.

    Returns:
        The run: finished, stopped, or (with wait=False) started.

    Raises:
        UserError: The config or the machine has an error that is found before the run starts.
        RunFailedError: The run failed.
    """
    from bigtrain.config import yaml_file
    from bigtrain.config.plugin import active_plugin
    from bigtrain.jobs.check import check

    resolved = read_config(config, overrides, name=name, plugin=plugin)
    place = Path(runs_dir).absolute()
    check(resolved, place)
    active = active_plugin()
    arguments = ["train", "", "--runs-dir", str(place)]
    if nproc is not None:
        arguments += ["--nproc", str(nproc)]
    for source in active.place.split(os.pathsep) if active is not None else ():
        arguments += ["--plugin", source]
    with tempfile.NamedTemporaryFile("w", prefix="bigtrain-", suffix=".yaml") as file:
        file.write(yaml_file.dump(resolved.plain()))
        file.flush()
        arguments[1] = file.name
        process = subprocess.Popen(module_command("bigtrain", *arguments), env=with_source(os.environ))
        run = _started(process, RunDirectory(place / resolved.name))
    if not wait:
        return run
    try:
        return run.wait()
    except KeyboardInterrupt:
        if process.poll() is None:
            print(f"{run.name}: stopping; the run saves a checkpoint first", file=sys.stderr)
            process.terminate()
            process.wait()
        raise


def _started(process: subprocess.Popen[bytes], directory: RunDirectory) -> Run:
    """Wait until the launcher has read the config and taken the lease, or has ended; return the run.

    Raises:
        UserError: The launcher refused the run; its message is on stderr.
    """
    from bigtrain.run import Lease

    while process.poll() is None:
        holder = Lease.holder(directory)
        if holder is not None and holder.pid == process.pid and directory.exists():
            break
        time.sleep(LOOK_S)
    if process.poll() == ExitCode.USER:
        raise UserError(f"The run '{directory.name}' did not start: see the error above")
    run = Run(directory.path)
    run._process = process
    return run
