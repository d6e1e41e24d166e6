"""Loading a checkpoint at any layout. All ranks agree on one step, and only verified files are read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.commit import Checkpoint
from bigtrain.checkpoint.manifest import Manifest, read_manifest
from bigtrain.checkpoint.ranks import RankGroup, world_group
from bigtrain.checkpoint.reader import SafeReader, read_metadata
from bigtrain.config import CorruptionError, UserError, nearest


@dataclass(frozen=True)
class Found:
    """A verified checkpoint, the same on all ranks."""

    step: int
    path: Path
    manifest: Manifest
    warnings: tuple[str, ...] = ()
    """One warning for each newer checkpoint that is damaged."""


def find(
    directory: Path,
    step: int | None = None,
    *,
    before: int | None = None,
) -> Found | None:
    """Find the newest checkpoint that passes verification, or verify that of `step`. Collective.

    Each rank verifies a share of the files. A damaged file found by one rank rejects the checkpoint on all ranks.

    Args:
        directory: The directory that holds the run's checkpoints.
        step: Step of the only checkpoint to consider; None: the newest intact one.
        before: The largest step to consider; None: no limit.

    Returns:
        The checkpoint. None if `step` is None and no checkpoint has ever been saved, or none up to step `before`.

    Raises:
        CorruptionError: The requested checkpoint is damaged, or all of them are.
        UserError: There is no checkpoint of `step`, or a newer version of bigtrain wrote it.
    """
    ranks = RankGroup(world_group())
    candidates = ranks.once(lambda: _candidates(directory, step))
    if before is not None:
        candidates = [found for found in candidates if found.step <= before]
        if not candidates:
            return None

    def check(candidate: Checkpoint) -> list[str]:
        parts = ranks.together(lambda: _verify_share(candidate, ranks))
        return ranks.share([problem for part in parts for problem in part] if ranks.first else None)

    if step is not None:
        problems = check(candidates[0])
        if problems:
            raise CorruptionError(
                f"the checkpoint of step {step} is damaged: {problems[0]}",
                str(candidates[0].path),
                "Use another step.",
            )
        chosen, warnings = candidates[0], list[str]()
    else:
        newest, warnings = commit.choose(directory, candidates, check)
        if newest is None:
            return None
        chosen = newest
    manifest = ranks.once(lambda: read_manifest(chosen.path))
    return Found(chosen.step, chosen.path, manifest, tuple(warnings))


def saved_shapes(found: Found) -> dict[str, tuple[int, ...]]:
    """Full (unsharded) shapes of all tensors in a verified checkpoint, by name."""
    entries = SafeReader(found.path, found.manifest.files).read_metadata().state_dict_metadata
    return {name: tuple(cast(TensorStorageMetadata, entry).size) for name, entry in entries.items()}


def read_saved(found: Found, name: str) -> Tensor:
    """Read one full (unsharded) tensor of a verified checkpoint, on the CPU."""
    return read_full(SafeReader(found.path, found.manifest.files), [name])[name]


def saved_names(found: Found) -> set[str]:
    """Names of all tensors in a verified checkpoint."""
    return set(SafeReader(found.path, found.manifest.files).read_metadata().state_dict_metadata)


def load(directory: Path, step: int, state: Mapping[str, Tensor]) -> Manifest:
    """Verify the checkpoint of a step and read it into `state`, by `find` and `load_found`; return its manifest."""
    found = find(directory, step)
    load_found(cast(Found, found), state)
    return cast(Found, found).manifest


def load_found(
    found: Found,
    state: Mapping[str, Tensor],
    *,
    prefix: str = "",
    leave: Sequence[str] = (),
) -> None:
    """Read a verified checkpoint into tensors and DTensors of any layout, in place. Collective.

    Each rank reads the saved pieces that overlap its own shards. Under pipeline parallelism, `state` may have different
    names on each rank. No tensor is written before the names, shapes and dtypes on all ranks have been checked.

    Args:
        found: The checkpoint, from `find`.
        state: The tensors to fill, by name.
        prefix: `state`, over all ranks, must have every saved name that begins with `prefix`.
        leave: Shell patterns of saved names that `state` need not have.

    Raises:
        UserError: A name is missing in the checkpoint or in `state`, or a shape or dtype differs.
        CorruptionError: The files match their hashes, but cannot be read as tensors.
    """
    ranks = RankGroup(world_group())
    reader = SafeReader(found.path, found.manifest.files)

    def check() -> list[str]:
        _check_fit(reader.read_metadata(), state, found.path)
        return sorted(state)

    parts = ranks.together(check)
    wanted = {name for part in parts for name in part}
    ranks.once(lambda: _check_all_wanted(reader.read_metadata(), wanted, found.path, prefix, leave))
    ranks.together(lambda: _read(reader, dict(state)))


def read_tensors(directory: Path, step: int, prefix: str = "model.") -> dict[str, Tensor]:
    """Verify a checkpoint and read full (unsharded) tensors from it, in this process alone; for sampling and export.

    Args:
        directory: The directory that holds the run's checkpoints.
        step: Step of the checkpoint.
        prefix: The beginning of the names of the tensors to read.

    Returns:
        CPU tensors by their names without `prefix`.

    Raises:
        UserError: There is no checkpoint of `step`, or a newer version of bigtrain wrote it.
        CorruptionError: The checkpoint is damaged.
    """
    reader = verified_reader(directory, step)
    names = [name for name in reader.read_metadata().state_dict_metadata if name.startswith(prefix)]
    return read_full(reader, names, prefix)


def verified_reader(directory: Path, step: int) -> SafeReader:
    """Verify a checkpoint in this process alone, and return a reader of its files.

    Raises:
        UserError: There is no checkpoint of `step`, or a newer version of bigtrain wrote it.
        CorruptionError: The checkpoint is damaged.
    """
    candidate = _candidates(directory, step)[0]
    problems = _verify_share(candidate, RankGroup(None))
    if problems:
        raise CorruptionError(
            f"the checkpoint of step {step} is damaged: {problems[0]}",
            str(candidate.path),
            "Use another step.",
        )
    return SafeReader(candidate.path, read_manifest(candidate.path).files)


def read_full(reader: SafeReader, names: Collection[str], prefix: str = "") -> dict[str, Tensor]:
    """Read full (unsharded) CPU tensors; the keys are `names` without `prefix`. The files are not verified."""
    sizes = reader.read_metadata().state_dict_metadata
    state: dict[str, Tensor] = {}
    for name in names:
        entry = cast(TensorStorageMetadata, sizes[name])
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    _check_fit(reader.read_metadata(), state, reader.path)
    _read(reader, state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _candidates(directory: Path, step: int | None) -> list[Checkpoint]:
    checkpoints = commit.list_checkpoints(directory)
    if step is None:
        return checkpoints
    wanted = [found for found in checkpoints if found.step == step]
    if not wanted:
        steps = ", ".join(str(found.step) for found in checkpoints) or "none"
        raise UserError(
            f"there is no checkpoint of step {step}", str(directory), f"Choose one of these steps: {steps}."
        )
    return wanted


def _verify_share(candidate: Checkpoint, ranks: RankGroup) -> list[str]:
    """Verify this rank's share of the files. The manifest and DCP's metadata are verified on every rank."""
    try:
        manifest = read_manifest(candidate.path)
    except CorruptionError as error:
        return [error.what]
    names = set(sorted(manifest.files)[ranks.rank :: ranks.size])
    problems = commit.verify(candidate.path, names=names)
    if not problems:
        try:
            read_metadata(candidate.path)
        except CorruptionError as error:
            problems.append(error.what)
    return problems


def _check_fit(metadata: Metadata, state: Mapping[str, Tensor], path: Path) -> None:
    saved = metadata.state_dict_metadata
    for name, tensor in state.items():
        if name not in saved:
            close = nearest(name, saved)
            raise UserError(
                f"the checkpoint has no {name!r}",
                str(path),
                f"Did you mean {close!r}?" if close else "It was written by another model or optimizer.",
            )
        entry = cast(TensorStorageMetadata, saved[name])
        if entry.size != tensor.shape or entry.properties.dtype != tensor.dtype:
            raise UserError(
                f"{name!r} is {tuple(entry.size)} {entry.properties.dtype} in the checkpoint "
                f"and {tuple(tensor.shape)} {tensor.dtype} here",
                str(path),
                "Load it into the model and optimizer that it was saved from.",
            )
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise CorruptionError(f"the shards of {name!r} do not cover the full tensor", str(path))


def _check_all_wanted(metadata: Metadata, wanted: set[str], path: Path, prefix: str, leave: Sequence[str]) -> None:
    for name in metadata.state_dict_metadata:
        if any(fnmatchcase(name, pattern) for pattern in leave):
            continue
        if name.startswith(prefix) and name not in wanted:
            close = nearest(name, wanted)
            raise UserError(
                f"the checkpoint holds {name!r}, which this model or optimizer does not have",
                str(path),
                f"The nearest name in this model is {close!r}."
                if close
                else "Load it into the model that it was saved from.",
            )


def _read(reader: SafeReader, state: dict[str, Tensor]) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad():
        planner.set_up_planner(state, reader.read_metadata(), is_coordinator=True)
        plan = planner.finish_plan(planner.create_local_plan())
        reader.read_data(plan, planner).wait()
