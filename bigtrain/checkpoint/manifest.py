"""The manifest, the file `manifest.json` that makes a directory of files a checkpoint.

It lists each file with its size and hash, identifies the run's configuration, and records the training progress. It
includes a checksum of itself, so a flipped bit in the manifest is detected like one in the weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, field_validator

from bigtrain.config import CorruptionError, UserError
from bigtrain.storage import hash_bytes, write_json

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_DEPTH = 32
RETIRED = ("position", "rng")
"""Keys of older manifests, always empty there, that are ignored."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.\-]*")
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

NonNegative = Annotated[int, Ge(0)]
Hash = Annotated[str, StringConstraints(pattern=r"^xxh3:[0-9a-f]{32}$")]


class FileRecord(BaseModel):
    """Size in bytes and hash of one file of a checkpoint."""

    model_config = _STRICT

    bytes: NonNegative
    hash: Hash


class Manifest(BaseModel):
    """The contents of `manifest.json`. A directory is an intact checkpoint if it has one and all files match it."""

    model_config = _STRICT

    format_version: int = FORMAT_VERSION
    step: NonNegative
    """Number of completed optimizer steps."""
    files: dict[str, FileRecord]
    config_hash: str
    """Hash of the resolved configuration, recipe and execution."""
    identity: str
    """Hash of the recipe."""
    world_size: Annotated[int, Ge(1)] = 1
    mesh: dict[str, int] = {}
    """Sizes of the mesh's axes when the checkpoint was saved; informative only, a load does not use them."""
    progress: dict[str, Any] = {}
    """State with which the trainer resumes, such as steps, tokens and schedule values."""
    versions: dict[str, str] = {}
    lease: NonNegative = 0
    """Number of the lease under which the checkpoint was saved; a writer with a smaller number may not publish."""
    permanent: bool = False
    """Whether pruning never removes the checkpoint."""
    created: str = ""
    """Time of the save in UTC, ISO 8601."""

    @field_validator("files")
    @classmethod
    def _are_plain_names(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            if not _FILE_NAME.fullmatch(name) or name in (".", "..", MANIFEST_NAME):
                raise ValueError(f"{name!r} is not a valid name for a file of a checkpoint")
        return files

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(record.bytes for record in self.files.values())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically, with its checksum."""
    value = manifest.model_dump(mode="json")
    write_json(directory / MANIFEST_NAME, {**value, "checksum": _checksum(value)})


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        CorruptionError: The manifest is missing, too large, malformed, or does not match its checksum.
        UserError: A newer version of bigtrain wrote it.
    """
    path = directory / MANIFEST_NAME
    value = read_object(path, MAX_MANIFEST_BYTES)
    checksum = value.pop("checksum", None)
    version = value.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint has format version {version}, this bigtrain reads up to {FORMAT_VERSION}",
            str(path),
            "Read it with the bigtrain that wrote it, or a newer one.",
        )
    if checksum != _checksum(value):
        raise CorruptionError("the manifest does not match its checksum", str(path))
    for key in RETIRED:
        value.pop(key, None)
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CorruptionError(f"the manifest is malformed: {field}: {first['msg']}", str(path)) from error


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a small file that holds one JSON object.

    Raises:
        CorruptionError: The file is missing or not a regular file, exceeds `max_bytes` or MAX_DEPTH nested levels, or
            does not hold a JSON object.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise CorruptionError(f"{path.name} is missing", str(path))
        if path.stat().st_size > max_bytes:
            raise CorruptionError(f"{path.name} is over {max_bytes} bytes", str(path))
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptionError(f"{path.name} cannot be read: {error}", str(path)) from error
    if not isinstance(value, dict) or _too_deep(value):
        raise CorruptionError(f"{path.name} is not a JSON object of at most {MAX_DEPTH} levels", str(path))
    return value


def _checksum(value: dict[str, Any]) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hash_bytes(canonical.encode())


def _too_deep(value: Any) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True
