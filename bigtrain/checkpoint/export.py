"""Export of weights to safetensors, under qualified names, for other tools."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import bigtrain
from bigtrain.checkpoint import commit, loader
from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.reader import SafeReader
from bigtrain.config import UserError
from bigtrain.storage import fsync_directory, fsync_file, write_json

MAX_FILE_BYTES = 5 * 10**9
"""Bytes above which the weights are split over several files, as is usual on the Hugging Face Hub."""

PREFIX = "model."


def export(directory: Path, step: int, out: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> list[Path]:
    """Write the weights of a verified checkpoint as `model.safetensors`, or as numbered parts with an index.

    One part at a time is in memory. The directory `out` is created completely, or not at all. A tied weight is written
    once, under its first name.

    Args:
        directory: The directory that holds the run's checkpoints.
        step: Step of the checkpoint.
        out: A directory that does not exist yet, or is empty.
        max_file_bytes: Most bytes of tensors in one file; a larger tensor has its own file.

    Returns:
        Paths of the written files.

    Raises:
        UserError: `out` is not empty, or there is no checkpoint of `step`.
        CorruptionError: The checkpoint is damaged.
    """
    reader = loader.verified_reader(directory, step)
    manifest = read_manifest(reader.path)
    parts = _split(reader, max_file_bytes)
    notes = {
        "format": "pt",
        "bigtrain": bigtrain.__version__,
        "step": str(step),
        "config_hash": manifest.config_hash,
        "identity": manifest.identity,
    }
    with appears_whole(out) as temporary:
        tensors = (loader.read_full(reader, part, PREFIX) for part in parts)
        names = write_files(tensors, len(parts), temporary, notes)
    return [out / name for name in names]


@contextmanager
def appears_whole(out: Path) -> Iterator[Path]:
    """Create a temporary directory that is renamed to `out` at the end, or removed after an exception.

    Raises:
        UserError: `out` exists and is not an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty", str(out), "Give a new directory.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        fsync_directory(temporary)
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
        fsync_directory(out.parent)
    finally:
        commit.discard(temporary)


def write_files(parts: Iterable[Mapping[str, Tensor]], count: int, out: Path, notes: dict[str, str]) -> list[str]:
    """Write each part of a model's tensors to a safetensors file, and an index if there are several parts.

    Args:
        parts: The tensors of each part by name; a part is requested after the one before has been written.
        count: Number of parts.
        out: An existing directory for the files.
        notes: Metadata written into each file.

    Returns:
        Names of the written files.
    """
    names = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(parts, start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(dict(tensors), out / name, metadata=notes)
        (out / name).chmod(0o644)  # safetensors makes the file readable only for its owner
        fsync_file(out / name)
        names.append(name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        write_json(
            out / "model.safetensors.index.json",
            {"metadata": {**notes, "total_size": total}, "weight_map": weight_map},
        )
        names.append("model.safetensors.index.json")
    return names


def _split(reader: SafeReader, max_file_bytes: int) -> list[list[str]]:
    """The weights' names in order, in parts of at most `max_file_bytes`; a larger tensor is its own part."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, saved in reader.read_metadata().state_dict_metadata.items():
        if not name.startswith(PREFIX):
            continue
        entry = cast(TensorStorageMetadata, saved)
        size = math.prod(entry.size) * entry.properties.dtype.itemsize
        if parts[-1] and filled + size > max_file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts
