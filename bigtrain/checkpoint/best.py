"""The best checkpoints of a run by a held-out metric, found from the manifests on the disk or on an object store.

With `checkpoint.best`, each manifest holds the rule and the metric's value at its own step. So the manifests alone
determine the best checkpoints, and every command and every attempt of the run finds the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.config import BestConfig
from bigtrain.checkpoint.manifest import Manifest, read_manifest
from bigtrain.config import CorruptionError

KEY: Final = "best"
"""Key of the rule and value in a manifest's `progress`, under "callbacks"."""


@dataclass(frozen=True)
class Best:
    """One of the best checkpoints: its step, the metric and the metric's value."""

    step: int
    metric: str
    value: float

    def plain(self) -> dict[str, Any]:
        """The fields as a dictionary, as events and `bigtrain status` show them."""
        return asdict(self)


def record_of(rule: BestConfig, value: float | None) -> dict[str, Any]:
    """The record in a manifest: the rule's keys, and the metric's value.

    Args:
        rule: The section `checkpoint.best`.
        value: The metric's value at the manifest's step; None if that step had no evaluation or no value.
    """
    return {**rule.plain(), "value": value}


def ranked(manifests: Iterable[Manifest]) -> list[Best]:
    """The best checkpoints by the rule in the newest manifest, best first; of equal values the earlier step is first.

    Args:
        manifests: Manifests of intact checkpoints, in any order.

    Returns:
        At most `keep` checkpoints; empty if the newest manifest has no rule.
    """
    by_step = {manifest.step: _record(manifest) for manifest in manifests}
    rule = by_step[max(by_step)] if by_step else {}
    if not rule:
        return []
    sign = 1 if rule["mode"] == "min" else -1
    found = [
        Best(step, rule["metric"], float(record["value"]))
        for step, record in by_step.items()
        if record and record["value"] is not None and record["metric"] == rule["metric"]
    ]
    return sorted(found, key=lambda best: (sign * best.value, best.step))[: rule["keep"]]


def best_checkpoints(directory: Path, known_good: set[tuple[str, int]] | None = None) -> list[Best]:
    """The best checkpoints in a directory of checkpoints, as `ranked` returns them.

    Args:
        directory: The directory that holds the run's checkpoints.
        known_good: The same set as in `commit.prune`. None: only the sizes of files are compared.
    """
    manifests = []
    for checkpoint in commit.list_checkpoints(directory):
        try:
            manifest = read_manifest(checkpoint.path)
        except CorruptionError:
            continue
        # A manifest without a rule may be the newest one, which decides.
        if not has_rule(manifest) or commit.is_sound(checkpoint.path, known_good):
            manifests.append(manifest)
    return ranked(manifests)


def has_rule(manifest: Manifest) -> bool:
    """Whether `checkpoint.best` was set when this checkpoint was saved."""
    return bool(_record(manifest))


def _record(manifest: Manifest) -> Mapping[str, Any]:
    record: Mapping[str, Any] = manifest.progress.get("callbacks", {}).get(KEY, {})
    return record
