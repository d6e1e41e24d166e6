"""Slots of a Ray cluster: a trial is a gang of agents, one a node, whose controller lives in the sweep's driver.

A slot keeps its gang from trial to trial: what the next one waits for is its ranks' start, and not Ray. After a trial
that did not finish the gang is placed anew, as it is where an agent was lost.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TextIO

from bigtrain.config import UserError
from bigtrain.hardware import lookup
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.ending import tell_end
from bigtrain.jobs.launch import run_controlled
from bigtrain.jobs.placers.placer import ElasticPlacer, Notice, PlacementCancelled
from bigtrain.jobs.placers.ray_cluster import View, look
from bigtrain.jobs.placers.ray_placer import RayPlacer
from bigtrain.jobs.protocol import AgentConnection, PeerLost, ProtocolError, keep_alive
from bigtrain.jobs.train import CheckedRun, check, node_sizes
from bigtrain.plugin import load_plugin
from bigtrain.run import ExitCode, RunConfig, load_config
from bigtrain.sweeps.config import SlotsConfig
from bigtrain.sweeps.slots import BETWEEN_SIGNALS_S, RunningTrial

LOOK_S: Final = 0.05
ACCELERATOR_LABEL: Final = "ray.io/accelerator-type"
CLOSE_S: Final = 30.0
"""How long gangs may take to end, together."""


def _connected() -> View:
    """What there is of the Ray cluster that this process was started in, or that RAY_ADDRESS names.

    Raises:
        UserError: There is none.
    """
    import ray

    try:
        if ray.is_initialized():
            return look()
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"slots.on is ray, and no cluster answers: {str(error).splitlines()[0]}", "slots.on",
            "Start the sweep on a node of the cluster, or set RAY_ADDRESS; or say slots.on=machine.",
        ) from None  # fmt: skip
    return look()


def _has_gpus(view: View) -> bool:
    return any(node.total.get("GPU") for node in view.nodes)


class RaySlots:
    """Slots of the Ray cluster that this process can reach, connected to when it is first needed; see `TrialStarter`.

    Args:
        config: How many; `procs` is the number of ranks on each of a trial's `job.nodes` nodes.
        job: The `job` section of the trials.
        plugin: Where the user's own code lies, on every node.
    """

    def __init__(self, config: SlotsConfig, job: JobConfig, plugin: str | None = None) -> None:
        self._config, self._job, self._plugin = config, job, plugin
        self._gangs: dict[int, _Gang] = {}
        # One at a time: two that look for nodes at once would choose the same.
        self._placing = threading.Lock()
        self.slots = self._auto() if config.count == "auto" else config.count

    def _auto(self) -> int:
        """As many gangs as the nodes that are there could hold."""
        view = _connected()
        kind = "GPU" if _has_gpus(view) else "CPU"
        places = sum(int(node.total.get(kind, 0) // self._config.procs) for node in view.nodes)
        return max(1, places // self._job.nodes)

    def check(self) -> None:
        """See `TrialStarter.check`: a cluster that answers."""
        _connected()

    def refusal(self, config: RunConfig, memory_bytes: int) -> str | None:
        """Memory of the largest nodes; what else a cluster cannot carry is known when its nodes have come."""
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
            f"its parameters, gradients and optimizer take {each / 1e9:.1f} GB on {nodes}, and the largest of the "
            f"cluster has {available / 1e9:.1f} GB"
        )

    def start(self, config: Path, runs_dir: Path, log: Path, slot: int) -> RunningTrial:
        """See `TrialStarter.start`. All nodes must see the runs directory and the shards at these paths."""
        log.parent.mkdir(parents=True, exist_ok=True)
        if slot not in self._gangs:
            self._gangs[slot] = _Gang(slot, self._config, self._placing, self._plugin)
            self._gangs[slot].start()
        trial = RayTrial(config.absolute(), runs_dir.absolute(), log)
        self._gangs[slot].waiting.put(trial)
        return trial

    def close(self) -> None:
        """Give all nodes back."""
        for gang in self._gangs.values():
            gang.end()
        deadline = time.monotonic() + CLOSE_S
        for gang in self._gangs.values():
            gang.join(max(0.0, deadline - time.monotonic()))
        self._gangs.clear()


class RayTrial:
    """A trial of a gang."""

    def __init__(self, config: Path, runs_dir: Path, log: Path) -> None:
        self.config, self.runs_dir, self.log = config, runs_dir, log
        self._code: int | None = None
        self._asked = 0
        self._ask: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """See `RunningTrial.poll`."""
        return self._code

    def stop(self, now: bool) -> None:
        """See `RunningTrial.stop`."""
        for press in range(2 if now else 1):
            if press:
                time.sleep(BETWEEN_SIGNALS_S)
            with self._lock:
                self._asked += 1
                if self._ask is not None:
                    self._ask()

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._asked > 0

    def listen(self, ask: Callable[[], None]) -> None:
        """Pass requests to stop on, also one that came before there was anybody to ask."""
        with self._lock:
            self._ask = ask
            if self._asked:
                ask()

    def finish(self, code: int) -> None:
        """It is over."""
        self._code = code


class _Gang(threading.Thread):
    """A slot: trains its trials one after another on one gang of agents."""

    def __init__(self, slot: int, config: SlotsConfig, placing: threading.Lock, plugin: str | None) -> None:
        super().__init__(name=f"slot-{slot}", daemon=True)
        self.waiting: queue.SimpleQueue[RayTrial | None] = queue.SimpleQueue()
        self._config, self._placing, self._plugin = config, placing, plugin
        self._placer: KeptPlacer | None = None
        self._running: RayTrial | None = None

    def end(self) -> None:
        """Ask the slot to end, at once."""
        running = self._running
        if running is not None:
            running.stop(now=True)
        self.waiting.put(None)

    def run(self) -> None:
        """Train what comes until the end is asked for; then give the nodes back."""
        while (trial := self._next()) is not None:
            self._running = trial
            with open(trial.log, "a", encoding="utf-8", buffering=1) as stream:
                code: int = ExitCode.FAILED
                try:
                    code = ExitCode.STOPPED if trial.is_stopping else self._train(trial, stream)
                except UserError as error:
                    print(f"error: {error}", file=stream)
                    code = error.exit_code
                except Exception:  # noqa: BLE001 - whatever ends one trial, the sweep goes on
                    traceback.print_exc(file=stream)
                if self._placer is not None and code != ExitCode.FINISHED:
                    self._placer.drop()
            self._running = None
            trial.finish(code)
        if self._placer is not None:
            self._placer.close()

    def _next(self) -> RayTrial | None:
        while True:
            with contextlib.suppress(queue.Empty):
                return self.waiting.get_nowait()
            if self._placer is None or not self._placer.keep(LOOK_S):
                time.sleep(LOOK_S)

    def _train(self, trial: RayTrial, stream: TextIO) -> int:
        plugin = None if self._plugin is None else load_plugin(self._plugin)
        run = check(load_config(trial.config, plugin=plugin), trial.runs_dir)
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
            run.say_start(count, stream)
            code = self._control(trial, run, lease.number, stream)
        tell_end(run.directory, config, code, stream)
        return code

    def _control(self, trial: RayTrial, run: CheckedRun, lease: int, stream: TextIO) -> int:
        config = run.prepared.config
        placer = self._placer_for(config, trial)

        def say(line: str) -> None:
            print(line, file=stream)

        placer.begin(say, run.directory.event)
        return run_controlled(
            run.directory.path, placer, nproc=self._config.procs, job=config.job, event=run.directory.event, say=say,
            environment={
                "BIGTRAIN_LEASE": str(lease), "OMP_NUM_THREADS": str(self._config.threads), **run.environment,
            },
            around=lambda controller: _heard(trial, controller.request_stop),
        )  # fmt: skip

    def _placer_for(self, config: RunConfig, trial: RayTrial) -> KeptPlacer:
        if self._placer is None:
            shards = [place for key in ("train", "validation") for place in config.data.places(key).values()]
            paths = [trial.runs_dir, *(Path(place) for place in shards if "://" not in place)]
            sizes = node_sizes(config, self._config.procs)
            logs = trial.log.parent
            self._placer = KeptPlacer(
                lambda say, event: RayPlacer(
                    config.job, logs=logs, say=say, procs=self._config.procs, sizes=sizes, paths=paths, on_event=event
                ),
                self._placing,
            )
        return self._placer


@contextlib.contextmanager
def _heard(trial: RayTrial, ask: Callable[[], None]) -> Iterator[None]:
    trial.listen(ask)
    yield


class KeptPlacer:
    """A placer whose agents outlast a run: the next one starts on them at once. An `ElasticPlacer`.

    Args:
        build: Makes the placer, given what prints a line and what writes an event.
        placing: Held while nodes are looked for and taken.
    """

    def __init__(
        self, build: Callable[[Callable[[str], None], Callable[..., None]], ElasticPlacer], placing: threading.Lock
    ) -> None:
        self._say: Callable[[str], None] = lambda line: None
        self._event: Callable[..., None] = lambda event, /, **fields: None
        # Both change with the run that has the agents.
        self._inner = build(lambda line: self._say(line), lambda event, /, **fields: self._event(event, **fields))
        self._placing = placing
        self._agents: list[AgentConnection] = []
        self._fresh = False
        """Whether a run has begun that has not asked for agents yet."""

    def begin(self, say: Callable[[str], None], event: Callable[..., None]) -> None:
        """Another run has the agents from now on."""
        self._say, self._event, self._fresh = say, event, True

    def keep(self, seconds: float) -> bool:
        """Wait, keeping the agents alive; False, at once, where there are none."""
        if not self._agents:
            return False
        try:
            keep_alive(self._agents, seconds)
        except (PeerLost, ProtocolError):
            for agent in self._agents:
                self._inner.distrust(agent.agent)
            self.drop()
        return True

    def drop(self) -> None:
        """Place anew for the next run."""
        self._agents = []

    def close(self) -> None:
        """Give the nodes back."""
        self._agents = []
        self._inner.release()

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """The agents of the run before, where they live and this run has lost none; see `Placer.place`."""
        fresh, self._fresh = self._fresh, False
        if fresh and self.keep(0.0) and self._agents:
            self._event("placed", nodes=len(self._agents), hosts=[agent.host for agent in self._agents], kept=True)
            return self._agents
        self._agents = []
        while not self._placing.acquire(timeout=LOOK_S):
            if cancelled():
                raise PlacementCancelled
        try:
            self._agents = self._inner.place(cancelled)
        finally:
            self._placing.release()
        return self._agents

    def release(self) -> None:
        """Nothing: the next placement ends this one, and `close` the last."""

    def distrust(self, agent: str) -> None:
        """See `ElasticPlacer.distrust`."""
        self._inner.distrust(agent)

    def exclude(self, agent: str) -> bool:
        """See `ElasticPlacer.exclude`."""
        return self._inner.exclude(agent)

    def leave(self, agent: str) -> None:
        """See `ElasticPlacer.leave`."""
        self._inner.leave(agent)

    def notices(self) -> list[Notice]:
        """See `ElasticPlacer.notices`."""
        return self._inner.notices()

    def larger(self) -> int:
        """See `ElasticPlacer.larger`."""
        return self._inner.larger()
