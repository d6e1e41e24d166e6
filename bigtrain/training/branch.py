"""A run that continues another run's checkpoint (`init.state: all`, `--fork`): which data it does not read again."""

from __future__ import annotations

from typing import Any

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.config import UserError
from bigtrain.data.config import ConsumedConfig
from bigtrain.run import RunDirectory, with_defaults
from bigtrain.training.prepare import Prepared
from bigtrain.training.source import CheckpointSource

ORDER_KEYS = ("train", "shuffle_window")
"""The keys of `data` on which the order of samples depends."""


def consumed(prepared: Prepared, source: CheckpointSource) -> ConsumedConfig | None:
    """The sequences that a branch of `source` must not read again; None if there are none to record.

    If data, batch and seed are those of the earlier run, the order stays the same function of the step. Otherwise a
    new phase of the data begins at the step of the branch, after the sequences that were consumed from each source.

    Raises:
        UserError: The order changes, and the earlier run had sequences of another length.
    """
    run = RunDirectory(source.run)
    if not run.exists():
        return None
    now = prepared.what
    before = with_defaults(run.recipe(), now, prepared.config)
    known = before["data"].get("consumed")
    if all(_order(before, key) == _order(now, key) for key in ("data", "batch", "seed")):
        return None if known is None else ConsumedConfig(**known)
    if before["model"].get("context") != now["model"].get("context"):
        raise UserError(
            "the earlier run had sequences of another length, so the sequences that it consumed cannot be skipped",
            "model.context",
            "Set init: {state: weights+optimizer}, which starts the data from the beginning.",
        )
    found = commit.find_checkpoint(source.checkpoints, source.step)
    assert found is not None  # `resolve_source` has found it
    progress = read_manifest(found.path).progress
    names = progress.get("sources") or {"train": before["data"]["train"]}
    consumed = {names[name]: int(count) for name, count in progress.get("drawn", {}).items()}
    earlier = {} if known is None else known["drawn"]
    return ConsumedConfig(step=source.step, drawn={**earlier, **consumed})


def _order(what: dict[str, Any], key: str) -> Any:
    return {name: what["data"].get(name) for name in ORDER_KEYS} if key == "data" else what[key]
