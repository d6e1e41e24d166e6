"""The energy that this machine's processors (RAPL) and GPUs (NVML) use, if their counters can be read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bigtrain.hardware import nvml

POWERCAP: Final = Path("/sys/class/powercap")
SAMPLE_S: Final = 60.0
"""Time between two readings: RAPL's counters wrap after 262 kJ, which a busy server processor uses in 10 minutes."""

Counter = Callable[[], float]
"""Returns joules since a fixed moment in the past; raises OSError if the counter can no longer be read."""


class RaplPackage:
    """A counter of a processor's energy, without that of its memory, that does not wrap.

    Args:
        path: A directory intel-rapl:N of powercap. By default, only root can read its counter.
    """

    def __init__(self, path: Path) -> None:
        self._file = path / "energy_uj"
        self._range_uj = int((path / "max_energy_range_uj").read_text())
        self._last_uj = int(self._file.read_text())
        self._sum_uj = 0

    def __call__(self) -> float:
        """Joules since the first reading."""
        now_uj = int(self._file.read_text())
        self._sum_uj += (now_uj - self._last_uj) % (self._range_uj + 1)
        self._last_uj = now_uj
        return self._sum_uj / 1e6


def rapl_packages(powercap: Path = POWERCAP) -> list[Counter]:
    """One counter for each processor; none if any of them cannot be read, as a partial sum would be misleading."""
    try:
        return [RaplPackage(path) for path in sorted(powercap.glob("intel-rapl:[0-9]*")) if path.name.count(":") == 1]
    except (OSError, ValueError):
        return []


class EnergyMeter:
    """Sums all energy counters in a background thread until `stop`.

    The meter measures the machine, not only the run, so the energy of other processes is included.

    Args:
        counters: The counters; by default all counters of this machine.
        sample_s: Seconds between two readings.
    """

    def __init__(self, counters: list[Counter] | None = None, sample_s: float = SAMPLE_S) -> None:
        self._counters = [*rapl_packages(), *nvml.energy_counters()] if counters is None else counters
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._readable = bool(self._counters)
        self._taken_j = self._read() if self._readable else 0.0
        if self._readable:
            threading.Thread(target=self._sample, args=(sample_s,), name="energy", daemon=True).start()

    def take(self) -> float | None:
        """Joules since the last call, or since the meter was created; None if they cannot be read."""
        with self._lock:
            now_j = self._read()
            if not self._readable:
                return None
            used_j, self._taken_j = now_j - self._taken_j, now_j
            return used_j

    def stop(self) -> None:
        """Stop the background thread."""
        self._stopped.set()

    def _read(self) -> float:
        try:
            return sum(counter() for counter in self._counters)
        except (OSError, ValueError):
            self._readable = False
            return 0.0

    def _sample(self, every_s: float) -> None:
        while not self._stopped.wait(every_s):
            with self._lock:
                self._read()
