"""Where a trial is started: slots of this machine, or gangs on a cluster (`bigtrain.sweeps.ray_slots`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from bigtrain import variables
from bigtrain.children import module_command, with_source
from bigtrain.config.plugin import active_plugin
from bigtrain.hardware import lookup
from bigtrain.hardware.this_machine import available_cores, available_memory_bytes, this_machine
from bigtrain.jobs.devices import visible_gpus
from bigtrain.jobs.processes import bound_to_parent
from bigtrain.run import RunConfig
from bigtrain.sweeps.config import SlotsConfig
from bigtrain.sweeps.gang import BETWEEN_SIGNALS_S
from bigtrain.sweeps.load import Sweep

CLOSE_S: Final = 5.0
"""How long a launcher without a trial may take to end its agent; on an idle machine it takes 0.1 s."""


class RunningTrial(Protocol):
    """A trial under way."""

    def poll(self) -> int | None:
        """Its exit code, one of `bigtrain.run.ExitCode` or minus a signal; None while it runs."""
        ...

    def stop(self, now: bool) -> None:
        """Ask it to save itself and exit, or to end at once."""
        ...


class TrialStarter(Protocol):
    """What runs trials: how many at once, what can never fit, and the start of one."""

    @property
    def slots(self) -> int:
        """Trials that run side by side."""
        ...

    def check(self) -> None:
        """Look whether there is anything to run trials on.

        Raises:
            UserError: There is not.
        """
        ...

    def refusal(self, config: RunConfig, memory_bytes: int) -> str | None:
        """Why a trial could never run here, or None.

        Args:
            memory_bytes: What its processes together hold at least.
        """
        ...

    def start(self, config: Path, runs_dir: Path, log: Path, slot: int) -> RunningTrial:
        """Start the trial of a config file; returns at once.

        Args:
            log: Takes what it prints, after what is there.
            slot: Which of the slots it fills, from 0.
        """
        ...

    def close(self) -> None:
        """Give back what is kept between trials; no trial is under way any more, or is ended at once."""
        ...


def starter_of(sweep: Sweep) -> TrialStarter:
    """The slots that a sweep's file configures.

    Raises:
        UserError: They lie on a cluster that does not answer.
    """
    active = active_plugin()
    plugin = None if active is None else active.place
    if sweep.config.slots.on == "machine":
        return LocalSlots(sweep.config.slots, plugin)
    from bigtrain.sweeps.ray_slots import RaySlots

    return RaySlots(sweep.config.slots, sweep.job(), plugin)


class LocalSlots:
    """Slots of this machine: a launcher each, which the kernel ends with the driver; it keeps its agent."""

    def __init__(self, config: SlotsConfig, plugin: str | None = None) -> None:
        self._procs, self._threads = config.procs, config.threads
        self._plugin = plugin
        self._gpus = visible_gpus()
        self._launchers: dict[int, Launcher] = {}
        self.slots = self._auto() if config.count == "auto" else config.count

    def _auto(self) -> int:
        units = self._gpus // self._procs if self._gpus else available_cores() // (self._procs * self._threads)
        return max(1, units)

    def check(self) -> None:
        """Nothing: this machine is there."""

    def refusal(self, config: RunConfig, memory_bytes: int) -> str | None:
        """Memory and devices; see `TrialStarter.refusal`."""
        if self._gpus and self._procs > self._gpus:
            return f"it takes {self._procs} GPUs, and this machine has {self._gpus}"
        if self._gpus:
            device = lookup(this_machine().device_name)
            available = device.memory_bytes * self._procs if device is not None else None
            place = f"{self._procs} GPUs have"
        else:
            available, place = available_memory_bytes(), "this machine has"
        if available is None or memory_bytes <= available:
            return None
        return (
            f"its parameters, gradients and optimizer take {memory_bytes / 1e9:.1f} GB, and {place} "
            f"{available / 1e9:.1f} GB"
        )

    def start(self, config: Path, runs_dir: Path, log: Path, slot: int) -> RunningTrial:
        """See `TrialStarter.start`. Only from the main thread: the kernel ends the slot with the thread's death."""
        launcher = self._launchers.get(slot)
        if launcher is None or not launcher.lives():
            launcher = self._launchers[slot] = Launcher(self.command(slot), self._environment(slot), log)
        return launcher.train(config.absolute(), runs_dir.absolute(), log)

    def close(self) -> None:
        """End the slots' processes: those that wait give their agents back first."""
        for launcher in self._launchers.values():
            launcher.close()
        for launcher in self._launchers.values():
            launcher.wait()
        self._launchers.clear()

    def command(self, slot: int) -> list[str]:
        """The process of a slot (`bigtrain.sweeps.launcher`)."""
        command = module_command("bigtrain.sweeps.launcher", str(slot), str(self._procs))
        return command if self._plugin is None else [*command, self._plugin]

    def _environment(self, slot: int) -> Mapping[str, str]:
        # Trials are short: what their ranks import is imported once a slot.
        environment = {variables.TEMPLATE: "1", **with_source(os.environ), "OMP_NUM_THREADS": str(self._threads)}
        if self._gpus:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = listed.split(",") if listed else [str(number) for number in range(self._gpus)]
            first = slot * self._procs % self._gpus
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + self._procs])
        return environment


class Launcher:
    """A slot's process, which trains one trial after another; the kernel ends it with the driver.

    Args:
        log: Takes what it prints until it has a trial's log.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._orders, child = socket.socketpair()
        self._orders.setblocking(False)
        with open(log, "ab") as output, child:
            self.process = subprocess.Popen(
                command, stdin=child.fileno(), stdout=output, stderr=output, env=environment, start_new_session=True,
                preexec_fn=bound_to_parent(),
            )  # fmt: skip
        self._heard = b""

    def lives(self) -> bool:
        """Whether it can train another trial."""
        return self.process.poll() is None

    def train(self, config: Path, runs_dir: Path, log: Path) -> LocalTrial:
        """Have it train a trial; returns at once."""
        order = {"config": str(config), "runs_dir": str(runs_dir), "log": str(log)}
        # One that has just died shows itself at the first look.
        with contextlib.suppress(OSError):
            self._orders.sendall(json.dumps(order).encode() + b"\n")
        return LocalTrial(self)

    def code(self) -> int | None:
        """The code of the trial that it was given last; minus a signal where one ended it; None while it trains."""
        died = self.process.poll()
        with contextlib.suppress(OSError):
            self._heard += self._orders.recv(4096)
        line, newline, self._heard = self._heard.rpartition(b"\n")
        return int(line) if newline else died

    def close(self) -> None:
        """Have it end once it has nothing to do."""
        self._orders.close()

    def wait(self) -> None:
        """Wait for its end, and make it end."""
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalTrial:
    """A trial in its slot's process."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._code: int | None = None

    @property
    def pid(self) -> int:
        """Of the launcher."""
        return self._launcher.process.pid

    def poll(self) -> int | None:
        """See `RunningTrial.poll`."""
        if self._code is None:
            self._code = self._launcher.code()
        return self._code

    def stop(self, now: bool) -> None:
        """See `RunningTrial.stop`."""
        with contextlib.suppress(ProcessLookupError):
            self._launcher.process.send_signal(signal.SIGTERM)
            if now:
                time.sleep(BETWEEN_SIGNALS_S)
                self._launcher.process.send_signal(signal.SIGTERM)
