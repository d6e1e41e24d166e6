"""The finding of `bigtrain data overlap` about the held-out data on which a law's losses were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigtrain.config import UserError, yaml_file

FILE = "overlap.json"
KIND = "bigtrain overlap"
SWEEP_CONFIG = "sweep.yaml"
HARMLESS = 0.001
"""Fraction of the held-out passages that may be in the training text without a warning."""


def overlap_of(source: object, given: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Read the finding for a law's page, with warnings about it.

    Args:
        source: The source of the runs. If it is a sweep's directory, its config names the shards.
        given: overlap.json, or the directory of held-out shards that contains it; None: the held-out shards of the
            sweep.

    Returns:
        The finding and the warnings; None and no warnings if there is no finding.

    Raises:
        UserError: There is no finding at `given`, or the file is not one.
    """
    train: Path | None = None
    if given is not None:
        file = Path(given) / FILE if Path(given).is_dir() else Path(given)
        if not file.exists():
            raise UserError(
                f"There is no result of `bigtrain data overlap` at '{given}'", str(file), "Run: bigtrain data overlap"
            )
    else:
        data = _data_of(source)
        if data is None:
            return None, []
        train, file = Path(data["train"]), Path(data["validation"]) / FILE
        if not file.exists():
            return None, []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(
            "The file is not a result of `bigtrain data overlap`", str(file), "Write it again: bigtrain data overlap"
        )
    kept = {name: found[name] for name in ("train", "validation", "passages", "exact", "near", "share", "rule")}
    kept["file"] = str(file)
    current = _fingerprint(train) if train is not None else None
    kept["same_train"] = None if current is None else current == found["fingerprints"]["train"]
    if kept["same_train"] is False:
        return kept, [f"{file} is about other training data than this sweep's: run bigtrain data overlap again"]
    if kept["share"] > HARMLESS:
        return kept, [
            f"{kept['share']:.2%} of the held-out passages are in the training text too ({kept['exact']} exact, "
            f"{kept['near']} near copies): losses are too low, and more so for larger models; pack the held-out text "
            "without them"
        ]
    return kept, []


def _data_of(source: object) -> dict[str, str] | None:
    """The training and held-out shards of a sweep; None unless each of them is a single directory."""
    file = Path(source) / SWEEP_CONFIG if isinstance(source, str) else None
    if file is None or not file.exists():
        return None
    base = yaml_file.parse(file.read_text(encoding="utf-8"), str(file)).value.get("base")
    data = base.get("data") if isinstance(base, dict) else None
    if not isinstance(data, dict) or not all(isinstance(data.get(name), str) for name in ("train", "validation")):
        return None
    return {"train": data["train"], "validation": data["validation"]}


def _fingerprint(shards: Path) -> str | None:
    try:
        found = json.loads((shards / "index.json").read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError):
        return None
    return str(found) if found else None
