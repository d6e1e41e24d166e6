"""Slots of a Ray cluster. A trial runs on a gang of agents, one per node; its controller is a thread of the driver."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from pathlib import Path
from typing import Final, TextIO

from bigtrain import variables
from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.hardware import lookup
from bigtrain.jobs.announce import say_start
from bigtrain.jobs.check import CheckedRun, check
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.ending import tell_end
from bigtrain.jobs.launch import run_controlled
from bigtrain.jobs.placers.ray import RayPlacer
from bigtrain.jobs.placers.ray.watch import View, look
from bigtrain.jobs.train import node_sizes
from bigtrain.run import ExitCode, RunConfig, load_config
from bigtrain.sweeps.config import SlotsConfig
from bigtrain.sweeps.gang import LOOK_S, Gang, GangTrial, KeptPlacer
from bigtrain.sweeps.slots import RunningTrial

ACCELERATOR_LABEL: Final = "ray.io/accelerator-type"
CLOSE_S: Final = 30.0
"""Seconds that all gangs together may take to end."""


def _connected() -> View:
    """The nodes of the Ray cluster that this process was started in, or that RAY_ADDRESS names.

    Raises:
        UserError: No cluster answers.
    """
    import ray

    try:
        if ray.is_initialized():
            return look()
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"slots.on is ray, but no cluster answers: {str(error).splitlines()[0]}", "slots.on",
            "Start the sweep on a node of the cluster, or set RAY_ADDRESS; or set slots.on=machine.",
        ) from None  # fmt: skip
    return look()


def _has_gpus(view: View) -> bool:
    return any(node.total.get("GPU") for node in view.nodes)


class RaySlots:
    """Slots of the Ray cluster that this process can reach; see `TrialStarter`. It connects on first use.

    Args:
        config: The sweep's section `slots`; `procs` is the number of ranks on each of a trial's `job.nodes` nodes.
        job: The `job` section of the trials.
        plugin: Path of the user's plugin, the same on every node; None: no plugin.
    """

    def __init__(self, config: SlotsConfig, job: JobConfig, plugin: str | None = None) -> None:
        self._config, self._job, self._plugin = config, job, plugin
        self._running: dict[int, _Slot] = {}
        # One placement at a time: two slots that search for nodes at the same time would choose the same nodes.
        self._placing = threading.Lock()
        self.slots = self._auto() if config.count == "auto" else config.count

    def _auto(self) -> int:
        """Number of gangs that the present nodes of the cluster can hold."""
        view = _connected()
        kind = "GPU" if _has_gpus(view) else "CPU"
        places = sum(int(node.total.get(kind, 0) // self._config.procs) for node in view.nodes)
        return max(1, places // self._job.nodes)

    def check(self) -> None:
        """See `TrialStarter.check`. Checks that a cluster answers."""
        _connected()

    def refusal(self, config: RunConfig, memory_bytes: int) -> str | None:
        """See `TrialStarter.refusal`. Compares only memory: of the largest node, or of `procs` of the largest GPUs.

        On a cluster with an autoscaler nothing is refused, because larger nodes may still come. Other limits are
        checked when nodes are placed.
        """
        view = _connected()
        if view.kinds is not None:
            return None
        each = memory_bytes / config.job.nodes
        available: float
        if _has_gpus(view):
            devices = [lookup(node.labels.get(ACCELERATOR_LABEL, "")) for node in view.nodes if node.total.get("GPU")]
            if None in devices:
                return None
            available = max(device.memory_bytes for device in devices if device is not None) * self._config.procs
        else:
            available = max((node.total.get("memory", 0.0) for node in view.nodes), default=0.0)
        if each <= available:
            return None
        nodes = f"each of {config.job.nodes} nodes" if config.job.nodes > 1 else "a node"
        return (
            f"its parameters, gradients and optimizer take {each / 1e9:.1f} GB on {nodes}, but the largest node of "
            f"the cluster has {available / 1e9:.1f} GB"
        )

    def start(self, config: Path, runs_dir: Path, log: Path, slot: int) -> RunningTrial:
        """See `TrialStarter.start`. The runs directory and the shards must have the same paths on all nodes."""
        log.parent.mkdir(parents=True, exist_ok=True)
        if slot not in self._running:
            self._running[slot] = _Slot(slot, self._config, self._placing, self._plugin)
            self._running[slot].start()
        trial = GangTrial(config.absolute(), runs_dir.absolute(), log)
        self._running[slot].waiting.put(trial)
        return RayTrial(trial)

    def close(self) -> None:
        """End all trials at once, and release all nodes."""
        for slot in self._running.values():
            slot.end()
        deadline = time.monotonic() + CLOSE_S
        for slot in self._running.values():
            slot.join(max(0.0, deadline - time.monotonic()))
        self._running.clear()


class RayTrial:
    """A trial that a slot of the cluster trains."""

    def __init__(self, trial: GangTrial) -> None:
        self._trial = trial

    def poll(self) -> int | None:
        """See `RunningTrial.poll`."""
        return self._trial.code

    def stop(self, now: bool) -> None:
        """See `RunningTrial.stop`."""
        self._trial.stop(now)


class _Slot(threading.Thread):
    """The thread of one slot, which trains its trials one after another on a gang of agents."""

    def __init__(self, slot: int, config: SlotsConfig, placing: threading.Lock, plugin: str | None) -> None:
        super().__init__(name=f"slot-{slot}", daemon=True)
        self.waiting: queue.SimpleQueue[GangTrial | None] = queue.SimpleQueue()
        self._config, self._placing, self._plugin = config, placing, plugin
        self._gang = Gang(self._train)
        self._running: GangTrial | None = None

    def end(self) -> None:
        """Ask the slot to end its trial at once and then to end itself."""
        running = self._running
        if running is not None:
            running.stop(now=True)
        self.waiting.put(None)

    def run(self) -> None:
        """Train the trials in the queue until the end is requested, then release the nodes."""
        while (trial := self._next()) is not None:
            self._running = trial
            with open(trial.log, "a", encoding="utf-8", buffering=1) as stream:
                code = self._gang.train(trial, stream)
            self._running = None
            trial.code = code
        self._gang.close()

    def _next(self) -> GangTrial | None:
        while True:
            with contextlib.suppress(queue.Empty):
                return self.waiting.get_nowait()
            self._gang.keep(LOOK_S)

    def _train(self, gang: Gang, trial: GangTrial, stream: TextIO) -> int:
        if self._plugin is not None:
            load_plugin(self._plugin)
        run = check(load_config(trial.config), trial.runs_dir)
        if run.finished:
            return ExitCode.FINISHED
        run = run.with_job(procs_per_node=self._config.procs)
        config = run.prepared.config
        count = config.job.nodes * self._config.procs
        try:
            config.layout.mesh(count)
        except ValueError as error:
            raise UserError(str(error), fix="Change base.job.nodes, slots.procs or base.layout.") from None
        with run.held() as lease:
            say_start(run, count, stream)
            code = self._control(gang, trial, run, lease.number, stream)
        tell_end(run.directory, config, code, stream)
        return code

    def _control(self, gang: Gang, trial: GangTrial, run: CheckedRun, lease: int, stream: TextIO) -> int:
        config = run.prepared.config
        placer = gang.placer(lambda: self._placer_for(config, trial))

        def say(line: str) -> None:
            print(line, file=stream)

        placer.begin(say, run.directory.event)
        return run_controlled(
            run.directory.path, placer, nproc=self._config.procs, job=config.job, event=run.directory.event, say=say,
            environment={
                variables.LEASE: str(lease), "OMP_NUM_THREADS": str(self._config.threads), **run.environment,
            },
            around=trial.heard,
        )  # fmt: skip

    def _placer_for(self, config: RunConfig, trial: GangTrial) -> KeptPlacer:
        shards = [place for key in ("train", "validation") for place in config.data.places(key).values()]
        paths = [trial.runs_dir, *(Path(place) for place in shards if "://" not in place)]
        sizes = node_sizes(config, self._config.procs)
        logs = trial.log.parent
        return KeptPlacer(
            lambda say, event: RayPlacer(
                config.job, logs=logs, say=say, procs=self._config.procs, sizes=sizes, paths=paths, on_event=event
            ),
            self._placing,
        )
