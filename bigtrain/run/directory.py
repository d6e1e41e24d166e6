"""The directory of a run, and the search for a run by its name."""

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
    """The directory that holds all files of a run; the file names are the same for every run."""

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
        """Whether a run was started in this directory, so that it has a run.json."""
        return self.record.exists()

    def is_foreign(self) -> bool:
        """Whether the directory is not a run, and contains files that an interrupted start of a run does not leave."""
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
        """The recipe of this run, as recorded at its first start."""
        recipe: dict[str, Any] = self.read_record()["what"]
        return recipe

    def read_record(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            UserError: The file does not exist, is damaged, or a newer version of bigtrain wrote it.
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
        """Refuse to continue this run with another recipe. A key that the recorded recipe lacks has its default.

        Args:
            config: The config with which the run is started again.
            recipe: The recipe of `config`.
            called: Names of data sets by fingerprint, to replace fingerprints in the message.

        Raises:
            UserError: The recipe differs from the recorded one; the message lists the keys that differ.
        """
        changed = list(differences(with_defaults(self.recipe(), recipe, config), recipe))
        for fingerprint, name in (called or {}).items():
            changed = [line.replace(fingerprint, name) for line in changed]
        if changed:
            raise UserError(
                f"The config trains something else than the run '{self.name}':\n    " + "\n    ".join(changed),
                str(self.path),
                "Undo the change, give the run another --name, or start a new run from this one with --fork NEW.",
            )

    def check_checkpoint(self, step: int, found: str) -> None:
        """Refuse a checkpoint that a run with another recipe has saved.

        Args:
            step: Step of the checkpoint.
            found: The identity in the checkpoint's manifest; "" if it was converted from another format.

        Raises:
            UserError: The identity is not that of this run.
        """
        expected = self.read_record()["identity"]
        if found and expected is not None and found != expected:
            raise UserError(
                f"The checkpoint of step {step} was saved by a run that trains something else: its identity is "
                f"{found[:12]}, that of '{self.name}' {expected[:12]}",
                str(self.checkpoints),
                "Move it away, or start a new run from it with init.source.",
            )

    def write(self, config: RunConfig, recipe: dict[str, Any]) -> None:
        """Write the resolved config, the used plugins, and at the first start the recipe with its identity."""
        from bigtrain.config import yaml_file  # only this function needs PyYAML

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
        """The hash of forecast.json, recorded at the run's first start; it is not a part of the identity."""
        forecast = self.path / names.FORECAST
        return {"forecast": storage.hash_file(forecast)} if forecast.exists() else {}


def find_checkpoints(name: str, runs_dir: Path) -> RunDirectory:
    """Find a run by name or path, or a directory with checkpoints without a run, as `checkpoint import` writes it.

    Raises:
        UserError: There is no such run or directory.
    """
    alone = RunDirectory(Path(name))
    is_run = (runs_dir / name / names.RECORD).exists() or alone.exists()
    return find_run(name, runs_dir) if is_run or not alone.checkpoints.is_dir() else alone


def find_run(run: str, runs_dir: Path) -> RunDirectory:
    """Find the directory of a run by its name under `runs_dir`, or by a path.

    Raises:
        UserError: There is no such run; the message names the run with the most similar name, or lists the runs.
    """
    for path in (runs_dir / run, Path(run)):
        if (path / names.RECORD).exists():
            # Path(".").name is empty.
            return RunDirectory(path if path.name not in ("", "..") else os.path.abspath(path))
    _refuse_other_weights(Path(run))
    known_names = [path.parent.name for path in runs_dir.glob(f"*/{names.RECORD}")]
    close = nearest(run, known_names)
    known = f"Choose one of: {', '.join(sorted(known_names)[:MAX_NAMED])}."
    if not known_names:
        known = "There are no runs; see --runs-dir."
    raise UserError(f"There is no run '{run}'", str(runs_dir), f"Did you mean '{close}'?" if close else known)


def _refuse_other_weights(path: Path) -> None:
    """Raise an error if a directory is no run, but contains weights that other commands accept."""
    if (path / names.CHECKPOINTS).is_dir():
        raise UserError(
            "The directory holds an imported checkpoint, not a run",
            str(path),
            "Use it with evaluate, sample, load, init.source, checkpoint export, convert, inspect, list or verify.",
        )
    if (path / "config.json").is_file():
        raise UserError(
            "The directory holds Hugging Face weights, not a run",
            str(path),
            "Use them with evaluate, sample, load and init.source, or make a checkpoint of them: checkpoint import.",
        )


def list_runs(runs_dir: Path) -> list[RunDirectory]:
    """All runs under a directory, sorted by name."""
    return [RunDirectory(path.parent) for path in sorted(runs_dir.glob(f"*/{names.RECORD}"))]


def split_run_step(text: str) -> tuple[str, int | None]:
    """Split RUN@STEP into the run and the step; the step is None if the text has none."""
    match = re.fullmatch(r"(.+)@([0-9]+)", text)
    return (match[1], int(match[2])) if match else (text, None)
