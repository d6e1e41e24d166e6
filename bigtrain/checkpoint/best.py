"""The best checkpoints of a run by a held-out metric, as the manifests on the disk or on a store name them.

With `checkpoint.best`, each manifest holds the rule and the metric's value at its own step. So a directory alone says
which checkpoints are the best, and every command and every attempt of the run finds the same ones.
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
"""Where a manifest's `progress` keeps it, under "callbacks"."""


@dataclass(frozen=True)
class Best:
    """A checkpoint, and the value for which it is kept."""

    step: int
    metric: str
    value: float

    def plain(self) -> dict[str, Any]:
        """The same as an event and `status` show it."""
        return asdict(self)


def record_of(rule: BestConfig, value: float | None) -> dict[str, Any]:
    """What a manifest holds.

    Args:
        value: Of the evaluation at the manifest's step; None where there was none, or nothing counted.
    """
    return {**rule.plain(), "value": value}


def ranked(manifests: Iterable[Manifest]) -> list[Best]:
    """The checkpoints to keep by the rule of the newest manifest, the best first; of equal ones the earlier first.

    Args:
        manifests: Of sound checkpoints, in any order.

    Returns:
        At most `keep`; empty where the newest manifest has no rule.
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
    """As `ranked`, of a directory of checkpoints.

    Args:
        known_good: As `commit.prune` takes it. None: files are compared by size alone.
    """
    manifests = []
    for checkpoint in commit.list_checkpoints(directory):
        try:
            manifest = read_manifest(checkpoint.path)
        except CorruptionError:
            continue
        # One without a record may be the newest, whose rule counts.
        if not has_rule(manifest) or commit.is_sound(checkpoint.path, known_good):
            manifests.append(manifest)
    return ranked(manifests)


def has_rule(manifest: Manifest) -> bool:
    """Whether the run kept its best checkpoints when this one was saved."""
    return bool(_record(manifest))


def _record(manifest: Manifest) -> Mapping[str, Any]:
    record: Mapping[str, Any] = manifest.progress.get("callbacks", {}).get(KEY, {})
    return record
