"""The directory of a run, and the search for one by name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bigtrain import storage
from bigtrain.config.errors import UserError, nearest
from bigtrain.run import names
from bigtrain.run.events import append_event
from bigtrain.run.plugins import used_plugins
from bigtrain.run.recipe import differences, identity, with_defaults

if TYPE_CHECKING:
    from bigtrain.run.config import RunConfig

FORMAT_VERSION: Final = 1
MAX_NAMED: Final = 10


class RunDirectory:
    """The directory in which a run keeps everything; the names in it are the same for every run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / names.CONFIG
        self.record = self.path / names.RECORD
        self.lease = self.path / names.LEASE
        self.metrics = self.path / names.METRICS
        self.events = self.path / names.EVENTS
        self.samples = self.path / names.SAMPLES
        self.checkpoints = self.path / names.CHECKPOINTS
        self.logs = self.path / names.LOGS

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.record.exists()

    def is_foreign(self) -> bool:
        """Whether this is not a run and holds more than a killed start leaves behind."""
        if self.exists() or not self.path.exists():
            return False
        known = (names.CONFIG, names.LEASE, names.EVENTS, names.FORECAST)
        return not self.path.is_dir() or any(
            entry.name not in known and not entry.name.startswith(tuple(f".{name}.tmp-" for name in known))
            for entry in self.path.iterdir()
        )

    def event(self, event: str, /, **fields: Any) -> None:
        """Append one line to events.jsonl; see `append_event`."""
        append_event(self.events, event, **fields)

    def recipe(self) -> dict[str, Any]:
        """The recipe of this run, as it was recorded when it was first started."""
        recipe: dict[str, Any] = self.read_record()["what"]
        return recipe

    def read_record(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            UserError: There is no run here, its record is damaged, or a newer bigtrain wrote it.
        """
        try:
            record = json.loads(self.record.read_text())
            version = int(record["format_version"])
            if version <= FORMAT_VERSION and not isinstance(record["what"], dict):
                raise TypeError("the recipe is missing")
        except FileNotFoundError:
            raise UserError(
                f"There is no run at {self.path}", fix="See the names under --runs-dir (default: runs/)."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                "run.json is damaged", str(self.record), "Restore it, or start again at another --name."
            ) from None
        if version > FORMAT_VERSION:
            raise UserError(
                f"run.json has format version {version}; this bigtrain reads up to {FORMAT_VERSION}",
                str(self.record),
                "Upgrade bigtrain.",
            )
        return record

    def check_identity(
        self, config: RunConfig, recipe: dict[str, Any], called: Mapping[str, str] | None = None
    ) -> None:
        """Refuse to continue this run as another one. A key that its record lacks equals its default.

        Args:
            recipe: That of `config`.
            called: Names of data for people, by fingerprint.

        Raises:
            UserError: With the keys that differ.
        """
        changed = list(differences(with_defaults(self.recipe(), recipe, config), recipe))
        for fingerprint, name in (called or {}).items():
            changed = [line.replace(fingerprint, name) for line in changed]
        if changed:
            raise UserError(
                f"The run '{self.name}' trains something else:\n    " + "\n    ".join(changed),
                str(self.path),
                "Undo the change, give the run another --name, or start a new run from this one with --fork NEW.",
            )

    def check_checkpoint(self, step: int, found: str) -> None:
        """Refuse a checkpoint of another run.

        Args:
            found: The identity in its manifest; "" in one that was converted from another format.

        Raises:
            UserError: It was saved by a run that trains something else.
        """
        expected = self.read_record()["identity"]
        if found and expected is not None and found != expected:
            raise UserError(
                f"The checkpoint of step {step} was saved by a run that trains something else: its identity is "
                f"{found[:12]}, that of '{self.name}' {expected[:12]}",
                str(self.checkpoints),
                "Move it away, or begin a new run from it with init.source.",
            )

    def write(self, config: RunConfig, recipe: dict[str, Any]) -> None:
        """Record the resolved config, the place of the model's code, and on the first start the recipe."""
        from bigtrain.config import yaml_file  # PyYAML is needed here alone

        self.path.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(self.config, yaml_file.dump(config.plain()))
        record = (
            self.read_record()
            if self.exists()
            else {
                "format_version": FORMAT_VERSION, "name": self.name, "identity": identity(recipe), "what": recipe,
                **self._forecast(),
            }
        )  # fmt: skip
        known = record | used_plugins(config)
        if not self.exists() or known != record:
            storage.write_json(self.record, known)

    def _forecast(self) -> dict[str, str]:
        """The hash of the run's forecast, which a run keeps from its first start on: not a part of its identity."""
        forecast = self.path / names.FORECAST
        return {"forecast": storage.hash_file(forecast)} if forecast.exists() else {}


def find_checkpoints(name: str, runs_dir: Path) -> RunDirectory:
    """A run by name or path, or a directory of checkpoints that no run has made, as `checkpoint import` writes it.

    Raises:
        UserError: There is neither.
    """
    alone = RunDirectory(Path(name))
    is_run = (runs_dir / name / names.RECORD).exists() or alone.exists()
    return find_run(name, runs_dir) if is_run or not alone.checkpoints.is_dir() else alone


def find_run(run: str, runs_dir: Path) -> RunDirectory:
    """The directory of a run given by its name under `runs_dir`, or by a path.

    Raises:
        UserError: There is none; names the nearest run.
    """
    for path in (runs_dir / run, Path(run)):
        if (path / names.RECORD).exists():
            # "." has no name.
            return RunDirectory(path if path.name not in ("", "..") else os.path.abspath(path))
    _refuse_other_weights(Path(run))
    known_names = [path.parent.name for path in runs_dir.glob(f"*/{names.RECORD}")]
    close = nearest(run, known_names)
    known = f"There are: {', '.join(sorted(known_names)[:MAX_NAMED])}."
    if not known_names:
        known = "There are none; see --runs-dir."
    raise UserError(f"There is no run '{run}'", str(runs_dir), f"Did you mean '{close}'?" if close else known)


def _refuse_other_weights(path: Path) -> None:
    """Refuse, in place of a run, what commands that read weights take as well."""
    if (path / names.CHECKPOINTS).is_dir():
        raise UserError(
            "The directory holds an imported checkpoint, and no run",
            str(path),
            "Use it with evaluate, sample, load, init.source, checkpoint export, convert, inspect, list or verify.",
        )
    if (path / "config.json").is_file():
        raise UserError(
            "The directory holds Hugging Face weights, and no run",
            str(path),
            "Use them with evaluate, sample, load and init.source, or make a checkpoint of them: checkpoint import.",
        )


def list_runs(runs_dir: Path) -> list[RunDirectory]:
    """Every run under a directory, by name."""
    return [RunDirectory(path.parent) for path in sorted(runs_dir.glob(f"*/{names.RECORD}"))]


def split_run_step(text: str) -> tuple[str, int | None]:
    """RUN@STEP as its two parts; the step is None where none is given."""
    match = re.fullmatch(r"(.+)@([0-9]+)", text)
    return (match[1], int(match[2])) if match else (text, None)
