"""One `fit()` of Ray Train, whose workers hold their nodes: each worker starts a node agent and ends with it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bigtrain import variables
from bigtrain.children import module_command
from bigtrain.jobs.nodes import Need, Node
from bigtrain.jobs.placing import PlacementCancelled, PlacementFailed, PlacementRefused, agent_environment
from bigtrain.jobs.processes import end_marked, is_stopped

LOOK_S: Final = 0.1
END_S: Final = 10.0
"""How long a `fit()` may take to end after its agents have ended."""
SEEN_S: Final = 5.0
"""How long a new file in a shared directory may take to appear on another node."""

_NOT_THERE: Final = "bigtrain: this node does not see "
_TRAIN_SETTINGS: Final = {
    # By default, Ray Train checks its workers every 2 s and gives up a silent worker after 10 minutes.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # The placer watches drained nodes itself, and the workers report nothing.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The agent's working directory is the working directory of the Ray job.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Order:
    """The arguments of each worker of a placement. `repr` does not show the token, because Ray prints failed calls."""

    address: str
    secret: Secret
    placement: str
    logs: str
    paths: tuple[str, ...]
    silence_s: float


class Secret:
    """A text that `repr` does not show."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return "Secret(...)"


class Fit(threading.Thread):
    """A thread that runs one `fit()` of Ray Train; `error` is the exception that ended it, or None."""

    def __init__(self, order: Order, nodes: list[Node], need: Need, gpus: bool) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._order = order
        self._nodes = nodes
        self._need = need
        self._gpus = gpus
        self.error: Exception | None = None

    def run(self) -> None:
        """Run `fit()` to its end."""
        for name, value in _TRAIN_SETTINGS.items():
            os.environ.setdefault(name, value)
        import ray
        from ray.exceptions import RayError
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        order = self._order
        # Ray Train requires a directory for checkpoints, which stays empty. It lies in Ray's session directory, so it
        # is removed with the session even if this process is killed.
        storage = Path(ray._private.worker._global_node.get_session_dir_path(), f"bigtrain-{order.placement}")
        try:
            trainer = DataParallelTrainer(
                lambda: hold_node(order),
                scaling_config=ScalingConfig(
                    num_workers=len(self._nodes),
                    use_gpu=self._gpus,
                    resources_per_worker=dict(self._need.each),
                    placement_strategy="STRICT_SPREAD",
                    label_selector=[
                        {ray._raylet.RAY_NODE_ID_KEY: node.name, **self._need.labels} for node in self._nodes
                    ],
                ),
                run_config=RunConfig(
                    name=order.placement,
                    storage_path=str(storage),
                    logging_config=LoggingConfig(log_level="CRITICAL"),
                    # By default, Ray Train requests lost nodes forever and restarts preempted workers.
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                ),
            )
            trainer.fit()
        except (TrainingFailedError, RayError, RuntimeError, ValueError, OSError) as error:
            self.error = error
        finally:
            shutil.rmtree(storage, ignore_errors=True)


def ended(fit: Fit, nodes: list[Node], lost: Exception, cancelled: Callable[[], bool]) -> PlacementFailed:
    """Why an agent was lost that had just connected.

    If one worker fails, Ray Train ends all workers before it reports the failure, so wait for the end of `fit()`.

    Args:
        fit: The thread.
        nodes: The nodes of the placement.
        lost: How the controller noticed the loss.
        cancelled: Whether to give up.

    Raises:
        PlacementCancelled: `cancelled` returned True.
    """
    deadline = time.monotonic() + END_S
    while fit.is_alive() and time.monotonic() < deadline:
        if cancelled():
            raise PlacementCancelled
        time.sleep(LOOK_S)
    if fit.is_alive() or fit.error is None:
        return PlacementFailed(f"an agent was lost again at once: {lost}")
    return failure(fit.error, nodes)


def failure(error: Exception | None, nodes: list[Node]) -> PlacementFailed:
    """Why a `fit()` ended before its agents had connected, as an exception to raise."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        for line in str(failure).splitlines():
            if _NOT_THERE in line:
                where, _, path = line.partition(_NOT_THERE)[2].partition(": ")
                return PlacementRefused(f"host {where} does not see {path}: all nodes must share it, at this path")
    first = next(iter(failures.values()), error)
    lines = [line for line in str(first).splitlines() if line.strip()] or ["the process ended without a message"]
    return PlacementFailed(lines[-1].strip())


def hold_node(order: Order) -> None:
    """The function of a Ray Train worker: starts this node's agent and waits until the agent ends.

    Raises:
        RuntimeError: A path does not exist on this node, or the agent failed. The error makes Ray Train release the
            other nodes.
    """
    import ray

    raylet = os.getppid()
    context = ray.get_runtime_context()
    host = socket.gethostname()
    _check_paths(order, host)
    mark = f"{context.get_node_id()}.{order.placement}"
    inherited = dict(os.environ)
    # Ray sets both in its workers: the thread count for all ranks together, and Ray's own debugger.
    for name in ("OMP_NUM_THREADS", "PYTHONBREAKPOINT"):
        _restore(name, inherited)
    environment = agent_environment(inherited, order.address, order.secret.text, mark)
    # The agent watches this process and ends with it; a `preexec_fn` is not safe, because Ray has threads.
    environment[variables.AGENT_PARENT] = str(os.getpid())
    with open(Path(order.logs, f"agent_{host}_{mark[:8]}.log"), "ab") as log:
        process = subprocess.Popen(
            module_command("bigtrain.jobs.agent"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait(process, order.silence_s, raylet)
    finally:
        process.kill()
        process.wait()
        end_marked(mark)
    if os.getppid() != raylet:
        # The raylet was killed, and Ray does not end its workers: end this one.
        os._exit(1)
    if process.returncode != 0:
        raise RuntimeError(f"the agent on {host} ended with {process.returncode}")


def _wait(process: subprocess.Popen[bytes], silence_s: float, raylet: int) -> None:
    """Wait until the agent has ended, or must be killed because the raylet is gone or the agent is stopped.

    Args:
        process: The agent.
        silence_s: Seconds after which the controller has given up an agent that is stopped by a signal.
        raylet: Process id of the raylet, the parent of this process.
    """
    stopped_since: float | None = None
    while process.poll() is None and os.getppid() == raylet:
        time.sleep(LOOK_S)
        if not is_stopped(process.pid):
            stopped_since = None
        elif stopped_since is None:
            stopped_since = time.monotonic()
        elif time.monotonic() - stopped_since > silence_s:
            return


def _check_paths(order: Order, host: str) -> None:
    deadline = time.monotonic() + SEEN_S
    for path in order.paths:
        while not os.path.exists(path):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{_NOT_THERE}{host}: {path}")
            time.sleep(LOOK_S)


def _restore(name: str, environment: dict[str, str]) -> None:
    """Reset a variable that Ray has set in this worker to its value in the environment of the raylet."""
    try:
        of_node = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return
    environment.pop(name, None)
    for entry in of_node:
        key, _, value = entry.partition(b"=")
        if key == name.encode():
            environment[name] = os.fsdecode(value)
