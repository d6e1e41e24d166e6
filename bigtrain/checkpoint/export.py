"""Export to safetensors, under qualified names: what any other tool can read."""

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
"""Above this, weights are split over several files, as the Hugging Face hub does."""

PREFIX = "model."


def export(directory: Path, step: int, out: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> list[Path]:
    """Write the weights of a verified checkpoint as `model.safetensors`, or as numbered parts with an index.

    Reads one part at a time. The directory `out` appears whole or not at all. A tied weight is there once,
    under its first name.

    Args:
        directory: Of the checkpoints.
        step: Which one.
        out: A directory that does not exist yet, or is empty.
        max_file_bytes: Bytes of tensors in one file; a larger tensor has a file of its own.

    Returns:
        The files written.

    Raises:
        UserError: `out` is not empty; there is no such step.
        CorruptionError: The checkpoint does not verify.
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
    """A temporary directory that becomes `out` at the end, and is removed where that is not reached.

    Raises:
        UserError: `out` is there, and not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty", str(out), "give a new directory")
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
    """Write each part of a model's tensors to a file of safetensors, and an index where there are several.

    Args:
        parts: `count` of them, each requested when the one before is on the disk.
        notes: What each file says of itself.
    """
    names = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(parts, start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(dict(tensors), out / name, metadata=notes)
        (out / name).chmod(0o644)  # safetensors makes it readable by its owner alone
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
    """The weights' names in order, in parts of at most `max_file_bytes` or one tensor."""
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
