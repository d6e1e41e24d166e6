"""Where a trial is started: slots of this machine, or gangs on a cluster (`bigtrain.sweeps.ray_slots`)."""

from __future__ import annotations

import contextlib
import os
import signal
import site
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from bigtrain.hardware import lookup
from bigtrain.hardware.this_machine import available_cores, available_memory_bytes, this_machine
from bigtrain.jobs.placers.local import visible_gpus
from bigtrain.jobs.processes import bound_to_parent
from bigtrain.run import RunConfig
from bigtrain.sweeps.config import SlotsConfig
from bigtrain.sweeps.load import Sweep

BETWEEN_SIGNALS_S = 0.15
"""Long enough for a launcher to take two signals for two requests."""


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
    """The slots that a sweep's file asks for.

    Raises:
        UserError: It asks for a cluster that does not answer.
    """
    plugin = sweep.plugin.source.place if sweep.plugin is not None else None
    if sweep.config.slots.on == "machine":
        return LocalSlots(sweep.config.slots, plugin)
    from bigtrain.sweeps.ray_slots import RaySlots

    return RaySlots(sweep.config.slots, sweep.job(), plugin)


class LocalSlots:
    """Slots of this machine: a trial is a `bigtrain train` of its own, which the kernel ends with the driver."""

    def __init__(self, config: SlotsConfig, plugin: str | None = None) -> None:
        self._procs, self._threads = config.procs, config.threads
        self._plugin = plugin
        self._gpus = visible_gpus()
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
        """See `TrialStarter.start`. Only from the main thread: the kernel ends the trial with the thread's death."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                self.command(config, runs_dir), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=self._environment(slot),
                start_new_session=True, preexec_fn=bound_to_parent(),
            )  # fmt: skip
        return LocalTrial(process)

    def close(self) -> None:
        """Nothing: the kernel ends what is left."""

    def command(self, config: Path, runs_dir: Path) -> list[str]:
        """The process of a trial."""
        command = [sys.executable, "-m", "bigtrain.cli", "train", str(config), "--runs-dir", str(runs_dir)]
        command += ["--nproc", str(self._procs)]
        return command if self._plugin is None else [*command, "--plugin", self._plugin]

    def _environment(self, slot: int) -> Mapping[str, str]:
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
        if self._gpus:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = listed.split(",") if listed else [str(number) for number in range(self._gpus)]
            first = slot * self._procs % self._gpus
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + self._procs])
        # A trial must run the driver's code, also where that is a checkout and not installed.
        root = str(Path(__file__).resolve().parents[2])
        if root not in site.getsitepackages():
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        return environment


class LocalTrial:
    """A `bigtrain train` process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Of the launcher."""
        return self._process.pid

    def poll(self) -> int | None:
        """See `RunningTrial.poll`."""
        return self._process.poll()

    def stop(self, now: bool) -> None:
        """See `RunningTrial.stop`."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
            if now:
                time.sleep(BETWEEN_SIGNALS_S)
                self._process.send_signal(signal.SIGTERM)
