"""The slots that trials run in: processes of this machine, or nodes of a Ray cluster (`bigtrain.sweeps.ray_slots`)."""

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
"""Seconds that a launcher without a trial may take to end its agent; on an idle machine it takes 0.1 s."""


class RunningTrial(Protocol):
    """A trial that has been started."""

    def poll(self) -> int | None:
        """The trial's exit code: one of `bigtrain.run.ExitCode`, or minus a signal's number; None while it runs."""
        ...

    def stop(self, now: bool) -> None:
        """Ask the trial to save a checkpoint and exit; with `now`, ask it to exit at once."""
        ...


class TrialStarter(Protocol):
    """Starts trials in a fixed number of slots, and refuses trials that can never fit."""

    @property
    def slots(self) -> int:
        """Number of trials that can run at the same time."""
        ...

    def check(self) -> None:
        """Check that there is a machine or a cluster to run trials on.

        Raises:
            UserError: There is none.
        """
        ...

    def refusal(self, config: RunConfig, memory_bytes: int) -> str | None:
        """The reason why a trial can never run in these slots; None if it can.

        Args:
            config: The trial's config.
            memory_bytes: Least memory of the trial, in bytes over all its ranks.
        """
        ...

    def start(self, config: Path, runs_dir: Path, log: Path, slot: int) -> RunningTrial:
        """Start the trial of a config file, without waiting for it.

        Args:
            config: The trial's YAML.
            runs_dir: The directory that holds the trials' run directories.
            log: File to which the trial's output is appended.
            slot: Number of the slot that the trial fills, from 0.
        """
        ...

    def close(self) -> None:
        """Release all resources that the slots hold. A trial that is still running is ended at once."""
        ...


def starter_of(sweep: Sweep) -> TrialStarter:
    """The slots that a sweep's section `slots` describes.

    Raises:
        UserError: The slots are on a Ray cluster, and no cluster answers.
    """
    active = active_plugin()
    plugin = None if active is None else active.place
    if sweep.config.slots.on == "machine":
        return LocalSlots(sweep.config.slots, plugin)
    from bigtrain.sweeps.ray_slots import RaySlots

    return RaySlots(sweep.config.slots, sweep.job(), plugin)


class LocalSlots:
    """Slots of this machine. Each slot has one launcher process, which keeps its agent between trials.

    The kernel ends the launchers when the driver ends.
    """

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
        """Do nothing: this machine is always available."""

    def refusal(self, config: RunConfig, memory_bytes: int) -> str | None:
        """See `TrialStarter.refusal`. Compares the number of GPUs and the memory."""
        if self._gpus and self._procs > self._gpus:
            return f"it needs {self._procs} GPUs, but this machine has {self._gpus}"
        if self._gpus:
            device = lookup(this_machine().device_name)
            available = device.memory_bytes * self._procs if device is not None else None
            place = f"{self._procs} GPUs have"
        else:
            available, place = available_memory_bytes(), "this machine has"
        if available is None or memory_bytes <= available:
            return None
        return (
            f"its parameters, gradients and optimizer take {memory_bytes / 1e9:.1f} GB, but {place} "
            f"{available / 1e9:.1f} GB"
        )

    def start(self, config: Path, runs_dir: Path, log: Path, slot: int) -> RunningTrial:
        """See `TrialStarter.start`.

        Only the main thread may call it: the kernel ends a slot's process when the thread that started it ends.
        """
        launcher = self._launchers.get(slot)
        if launcher is None or not launcher.lives():
            launcher = self._launchers[slot] = Launcher(self.command(slot), self._environment(slot), log)
        return launcher.train(config.absolute(), runs_dir.absolute(), log)

    def close(self) -> None:
        """End the slots' processes. A launcher without a trial first ends its agent."""
        for launcher in self._launchers.values():
            launcher.close()
        for launcher in self._launchers.values():
            launcher.wait()
        self._launchers.clear()

    def command(self, slot: int) -> list[str]:
        """The command line of a slot's process (`bigtrain.sweeps.launcher`)."""
        command = module_command("bigtrain.sweeps.launcher", str(slot), str(self._procs))
        return command if self._plugin is None else [*command, self._plugin]

    def _environment(self, slot: int) -> Mapping[str, str]:
        # Trials are short, so their ranks are forked from a process that imports torch once per slot.
        environment = {variables.TEMPLATE: "1", **with_source(os.environ), "OMP_NUM_THREADS": str(self._threads)}
        if self._gpus:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = listed.split(",") if listed else [str(number) for number in range(self._gpus)]
            first = slot * self._procs % self._gpus
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + self._procs])
        return environment


class Launcher:
    """The process of one slot, which trains one trial after another. The kernel ends it when the driver ends.

    Args:
        command: The command line of the process.
        environment: All environment variables of the process.
        log: File to which the output is appended until the first trial brings a log of its own.
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
        """Whether the process runs, so that it can train another trial."""
        return self.process.poll() is None

    def train(self, config: Path, runs_dir: Path, log: Path) -> LocalTrial:
        """Send the launcher a trial to train, without waiting for it."""
        order = {"config": str(config), "runs_dir": str(runs_dir), "log": str(log)}
        # If the launcher has just died, the first call of `code` finds out.
        with contextlib.suppress(OSError):
            self._orders.sendall(json.dumps(order).encode() + b"\n")
        return LocalTrial(self)

    def code(self) -> int | None:
        """Exit code of the newest trial; None while it trains.

        If the launcher itself has ended, this is its own exit code: minus the number of the signal that ended it.
        """
        died = self.process.poll()
        with contextlib.suppress(OSError):
            self._heard += self._orders.recv(4096)
        line, newline, self._heard = self._heard.rpartition(b"\n")
        return int(line) if newline else died

    def close(self) -> None:
        """Ask the launcher to exit once it trains no trial."""
        self._orders.close()

    def wait(self) -> None:
        """Wait up to `CLOSE_S` seconds for the launcher to exit, then kill it."""
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalTrial:
    """A trial that the launcher of a slot trains."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._code: int | None = None

    @property
    def pid(self) -> int:
        """Process id of the launcher."""
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
