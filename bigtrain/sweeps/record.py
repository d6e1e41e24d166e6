"""The record of a sweep in its directory, and the check that a sweep's file still matches it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bigtrain import storage
from bigtrain.config import UserError, yaml_file
from bigtrain.run import RECIPE, differences, names
from bigtrain.sweeps.config import LadderConfig, SizeConfig
from bigtrain.sweeps.journal import FORMAT_VERSION, SweepDirectory
from bigtrain.sweeps.load import Sweep


def sizes_of(sweep: Sweep) -> list[SizeConfig]:
    """The sizes of a sweep, the largest first.

    Raises:
        UserError: `sizes` is auto, which only `bigtrain sweep plan` supports.
    """
    sizes = sweep.config.ladder_sizes()
    if not sizes:
        raise UserError(
            "sizes: auto is for `bigtrain sweep plan`, which prints the sizes that fill the budget", sweep.where,
            "Write those sizes into the file, then run it.",
        )  # fmt: skip
    return sizes


def identity_of(sweep: Sweep) -> dict[str, Any]:
    """The settings that all trials of a sweep share, and that must not change.

    Sizes, lengths, seeds, slots, the target and the learning rates to try are not among them.
    """
    base = {key: value for key, value in sweep.document.value.items() if key in RECIPE}
    config = sweep.config.plain()
    return {"base": base, "ladder": config["ladder"], "learning_rates": _without_factors(config["learning_rates"])}


def _without_factors(rates: dict[str, Any] | None) -> dict[str, Any] | None:
    """The section `learning_rates` without its factors, to which a user may add."""
    return None if rates is None else {key: value for key, value in rates.items() if key != "factors"}


def _read_ladder(what: dict[str, Any]) -> Any:
    """The section `ladder` of a record; keys that a newer bigtrain has added have their defaults."""
    try:
        return LadderConfig.model_validate(what["ladder"]).plain()
    except ValidationError:
        # For example a rule that is no longer registered: the list of differences then names it.
        return what["ladder"]


def check_same(sweep: Sweep, directory: SweepDirectory) -> None:
    """Refuse a directory that belongs to a sweep with other shared settings, or to a run.

    Raises:
        UserError: The directory is a run's, or shared settings differ; the text lists the keys that differ.
    """
    if (directory.path / names.RECORD).exists():
        raise UserError(f"{directory.path} is a run, not a sweep", fix="Choose another name for the sweep.")
    if not directory.record.exists():
        return
    record = read_record(directory.record)
    what = record["what"]
    known = {**what, "ladder": _read_ladder(what), "learning_rates": _without_factors(what.get("learning_rates"))}
    changed = list(differences(known, identity_of(sweep)))
    if changed:
        raise UserError(
            f"The config trains something else than the sweep '{directory.name}':\n    " + "\n    ".join(changed),
            str(directory.path),
            "Undo the change, or give the sweep another name. Sizes, lengths, seeds and slots may change.",
        )


def read_record(path: Path) -> dict[str, Any]:
    """Read a sweep's record.

    Raises:
        UserError: The record is damaged, or a newer bigtrain wrote it.
    """
    try:
        record = json.loads(path.read_text())
        version = int(record["format_version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path.name} is damaged", str(path), "Restore it, or give the sweep another name.") from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path.name} has format version {version}; this bigtrain reads up to {FORMAT_VERSION}", str(path),
            "Upgrade bigtrain.",
        )  # fmt: skip
    return dict(record)


def write_record(sweep: Sweep, directory: SweepDirectory) -> None:
    """Write the sweep's record and its full config, so that `bigtrain sweep resume` needs no other file."""
    directory.path.mkdir(parents=True, exist_ok=True)
    if not directory.record.exists():
        record = {"format_version": FORMAT_VERSION, "name": sweep.config.name, "what": identity_of(sweep)}
        storage.write_json(directory.record, record)
    base = dict(sweep.document.value)
    data = dict(base["data"])
    for key in ("train", "validation"):
        if isinstance(data.get(key), str) and "://" not in data[key]:
            data[key] = os.path.abspath(data[key])
    base["data"] = data
    storage.write_atomic(directory.config, yaml_file.dump({**sweep.config.plain(), "base": base}))
