"""The file metrics.jsonl: one JSON object for each logged step."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtrain.run import names
from bigtrain.storage import LineLog, cut_lines, read_lines, write_atomic

_log = logging.getLogger(__name__)

NAMES = (
    "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes", "data_wait_s",
)  # fmt: skip
"""The keys of every object. `tokens` and `tokens_per_s` count what counts in the model's loss, such as images; their
units and the loss's are in metrics.units.json. An evaluation adds `val_loss` and `val_bits_per_byte` to the object of
its step, a mixture adds `loss/SOURCE`, and a model of several parts `loss/PART`."""


_OWN = {
    *NAMES, "mfu_causal", "skipped_steps", "loss_scale", "val_loss", "val_bits_per_byte",
}  # fmt: skip
_FAMILIES = ("loss/", "epochs/", "tokens/", "forecast/", "val_loss/", "val_bits_per_byte/")


def is_recorded(name: str) -> bool:
    """Whether a key of an object is a metric that a model, callback or evaluator has recorded under this name."""
    return name not in _OWN and not name.startswith(_FAMILIES)


def part_losses(keys: Collection[str]) -> list[str]:
    """Names of a model's parts, from the keys of an object: `loss/PART` without the `epochs/SOURCE` of a mixture."""
    names = [key.removeprefix("loss/") for key in keys if key.startswith("loss/")]
    return [name for name in names if f"epochs/{name}" not in keys]


class MetricsFile:
    """The writer of a run's metrics.jsonl; only one process at a time may have one.

    Args:
        path: The file, which the first append creates.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._log = LineLog(self.path)
        self._last_step: int | None = None
        self._units: dict[str, str] = {}
        if _torn(self.path):
            cut_lines(self.path, keep=lambda value: True)

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Append the object of one step; numbers that are not finite are written as null, since JSON has no NaN.

        Raises:
            ValueError: `metrics` has no integer `step`, or the step is not greater than that of the last object.
        """
        step = metrics.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(f"metrics need a whole number 'step', not {step!r}")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step} in {self.path.name}; cut it first")
        self._log.append({key: plain(value) for key, value in metrics.items()})
        self._last_step = step

    def add_units(self, units: Mapping[str, str]) -> None:
        """Add the units of metrics to metrics.units.json, if one of them is new."""
        if units.items() <= self._units.items():
            return
        self._units = {**read_units(self.path), **self._units, **units}
        text = json.dumps({"format_version": 1, "units": self._units}, indent=1, sort_keys=True)
        try:
            write_atomic(_units_file(self.path), text + "\n")
        except OSError as error:
            # A full disk must not end the training.
            _log.warning("the units of metrics could not be written: %s", error)

    def cut(self, step: int) -> None:
        """Remove the objects of steps after `step`, since a resume from its checkpoint logs these steps again."""
        cut_lines(self.path, keep=lambda value: not isinstance(value.get("step"), int) or value["step"] <= step)
        self._last_step = None


def plain(value: Any) -> Any:
    """Convert a value to JSON types: numpy and torch scalars to numbers, NaN and infinities to None."""
    if hasattr(value, "item") and not isinstance(value, (bool, int, float, str)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the objects of a metrics.jsonl in order of steps, each step once; a missing file has no objects."""
    rows: list[dict[str, Any]] = []
    for row in step_rows(path):
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows


def read_run_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the objects of the metrics.jsonl in a run's directory, as `read_metrics`."""
    return read_metrics(run_dir / names.METRICS)


def last_step(path: str | os.PathLike[str]) -> int | None:
    """The last logged step, or None if there is none."""
    steps = [row["step"] for row in step_rows(path)]
    return steps[-1] if steps else None


def step_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Iterate over the objects that have an integer `step`, in the order of the file."""
    for row in read_lines(path):
        if isinstance(row.get("step"), int):
            yield row


def read_units(path: str | os.PathLike[str]) -> dict[str, str]:
    """Units of the metrics in a metrics.jsonl, by their names; {} if the file of units cannot be read."""
    try:
        units = json.loads(_units_file(Path(path)).read_text())["units"]
        return {str(name): str(unit) for name, unit in units.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _units_file(path: Path) -> Path:
    return path.with_name("metrics.units.json")


def _torn(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False
