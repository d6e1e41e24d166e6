"""What lies in a directory of checkpoints, sound or not; without torch, but for the tensors of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.best import best_checkpoints
from bigtrain.checkpoint.manifest import MANIFEST_NAME, read_manifest
from bigtrain.checkpoint.store import RunStore
from bigtrain.config import CorruptionError, UserError


@dataclass(frozen=True)
class CheckpointState:
    """One published checkpoint."""

    step: int
    bytes: int
    """Of all files that are there."""
    problems: tuple[str, ...]
    """What is wrong with it; empty where all that was read is as the manifest says."""
    read: bool = True
    """Whether every byte was read, and not sizes alone."""
    best: bool = False
    """Whether it is kept as one of the best (`checkpoint.best`)."""

    @property
    def verified(self) -> bool | None:
        """Whether a run may resume from it; None where that takes reading it."""
        return None if not self.problems and not self.read else not self.problems


def survey(directory: Path, step: int | None = None) -> list[CheckpointState]:
    """Verify every checkpoint, or that of `step`, oldest first.

    Raises:
        UserError: There is none of `step`.
    """
    found = commit.list_checkpoints(directory)
    best = {one.step for one in best_checkpoints(directory)}
    if step is not None:
        steps = [checkpoint.step for checkpoint in found]
        found = [checkpoint for checkpoint in found if checkpoint.step == step]
        if not found:
            known = f"There are: {', '.join(map(str, steps))}." if steps else "There is none at all."
            raise UserError(f"There is no checkpoint of step {step}", str(directory), known)
    return [
        CheckpointState(
            checkpoint.step,
            sum(file.stat().st_size for file in checkpoint.path.iterdir() if file.is_file()),
            tuple(commit.verify(checkpoint.path)),
            best=checkpoint.step in best,
        )
        for checkpoint in found
    ]


def survey_store(url: str, step: int | None = None, *, hashes: bool = True) -> list[CheckpointState]:
    """As `survey`, of the run of a URL on an object store.

    Args:
        hashes: Read every byte; otherwise compare sizes alone.

    Raises:
        UserError: There is none of `step`, or the store cannot be read.
    """
    store = RunStore(url)
    listing = {one: sizes for one, sizes in store.listing().items() if MANIFEST_NAME in sizes}
    if step is not None:
        if step not in listing:
            known = f"There are: {', '.join(map(str, listing))}." if listing else "There is none at all."
            raise UserError(f"There is no checkpoint of step {step}", store.url, known)
        listing = {step: listing[step]}
    best = {one.step for one in store.best()}
    return [
        CheckpointState(
            one, sum(sizes.values()), tuple(store.problems(one, sizes, hashes=hashes)), read=hashes, best=one in best
        )
        for one, sizes in listing.items()
    ]


def inspect(directory: Path, step: int) -> dict[str, Any]:
    """All that a checkpoint says of itself, and its tensors; their values are not read.

    Returns:
        The manifest's facts, "bytes", "problems" (by sizes alone), "best" (the run's best checkpoints),
        "parameters" (numbers in the model), and "tensors": of each name, shape, dtype, and the pieces it was saved in.

    Raises:
        UserError: There is none of `step`.
        CorruptionError: Its manifest or metadata cannot be read.
    """
    found = commit.find_checkpoint(directory, step)
    if found is None:
        survey(directory, step)  # which says what there is
        raise CorruptionError(f"the checkpoint of step {step} has gone", str(directory))
    manifest = read_manifest(found.path)
    from bigtrain.checkpoint.reader import read_metadata  # torch, which takes seconds

    entries: Any = read_metadata(found.path).state_dict_metadata
    tensors = [
        {
            "name": name,
            "shape": list(entry.size),
            "dtype": str(entry.properties.dtype).removeprefix("torch."),
            "pieces": len(entry.chunks),
        }
        for name, entry in entries.items()
    ]
    model = (tensor for tensor in tensors if tensor["name"].startswith("model."))
    return {
        **manifest.model_dump(mode="json"),
        "bytes": manifest.total_bytes,
        "problems": commit.verify(found.path, hashes=False),
        "best": [best.plain() for best in best_checkpoints(directory)],
        "parameters": sum(math.prod(tensor["shape"]) for tensor in model),
        "tensors": tensors,
    }


def verify_all(states: Sequence[CheckpointState], where: str) -> list[int]:
    """The steps of surveyed checkpoints, all of them sound.

    Raises:
        CorruptionError: One of them is damaged.
    """
    damaged = [state for state in states if not state.verified]
    if damaged:
        listed = "\n    ".join(f"step {state.step}: {problem}" for state in damaged for problem in state.problems)
        raise CorruptionError(
            f"{len(damaged)} of {len(states)} checkpoints are damaged:\n    {listed}",
            where,
            "A resume passes over damaged checkpoints; remove their directories to silence this.",
        )
    return [state.step for state in states]
