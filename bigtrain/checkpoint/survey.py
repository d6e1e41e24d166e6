"""Surveys of all checkpoints of a run, intact or damaged. Only `inspect` imports torch."""

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
    """The state of one published checkpoint."""

    step: int
    bytes: int
    """Bytes of all existing files."""
    problems: tuple[str, ...]
    """One sentence for each problem; empty if the files match the manifest, as far as they were read."""
    read: bool = True
    """Whether every byte was read; otherwise only sizes were compared."""
    best: bool = False
    """Whether it is kept as one of the best checkpoints (`checkpoint.best`)."""

    @property
    def verified(self) -> bool | None:
        """Whether the checkpoint is intact, so that a run may resume from it; None if only sizes were compared."""
        return None if not self.problems and not self.read else not self.problems


def survey(directory: Path, step: int | None = None) -> list[CheckpointState]:
    """Verify all checkpoints in a directory, or only that of `step`; the result is in order of steps.

    Raises:
        UserError: There is no checkpoint of `step`.
    """
    found = commit.list_checkpoints(directory)
    best = {one.step for one in best_checkpoints(directory)}
    if step is not None:
        steps = [checkpoint.step for checkpoint in found]
        found = [checkpoint for checkpoint in found if checkpoint.step == step]
        if not found:
            known = (
                f"Choose one of these steps: {', '.join(map(str, steps))}." if steps else "There are no checkpoints."
            )
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
    """Verify all checkpoints of a run on an object store, or only that of `step`; the result is in order of steps.

    Args:
        url: URL of the run on the store, PREFIX/NAME.
        step: Step of the only checkpoint to verify; None: all.
        hashes: Whether to read every byte and compare hashes; otherwise only sizes are compared.

    Raises:
        UserError: There is no checkpoint of `step`, or the store cannot be read.
    """
    store = RunStore(url)
    listing = {one: sizes for one, sizes in store.listing().items() if MANIFEST_NAME in sizes}
    if step is not None:
        if step not in listing:
            known = (
                f"Choose one of these steps: {', '.join(map(str, listing))}."
                if listing
                else "There are no checkpoints."
            )
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
    """Describe a checkpoint and its tensors, without reading the tensors' values.

    Returns:
        The manifest's fields; "bytes"; "problems", found by sizes only; "best", the run's best checkpoints;
        "parameters", the number of parameters; and "tensors": name, shape, dtype and number of saved pieces of each.

    Raises:
        UserError: There is no checkpoint of `step`.
        CorruptionError: The checkpoint's manifest or metadata cannot be read.
    """
    found = commit.find_checkpoint(directory, step)
    if found is None:
        survey(directory, step)  # raises UserError, which lists the existing steps
        raise CorruptionError(f"the checkpoint of step {step} no longer exists", str(directory))
    manifest = read_manifest(found.path)
    from bigtrain.checkpoint.reader import read_metadata  # imports torch, which takes seconds

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
    """Check that all surveyed checkpoints are intact, and return their steps.

    Args:
        states: The result of `survey` or `survey_store`.
        where: Directory or URL of the checkpoints, for the error.

    Raises:
        CorruptionError: A checkpoint is damaged, or was compared by sizes only.
    """
    damaged = [state for state in states if not state.verified]
    if damaged:
        listed = "\n    ".join(f"step {state.step}: {problem}" for state in damaged for problem in state.problems)
        raise CorruptionError(
            f"{len(damaged)} of {len(states)} checkpoints are damaged:\n    {listed}",
            where,
            "A resume skips damaged checkpoints. Remove their directories to stop this error.",
        )
    return [state.step for state in states]
