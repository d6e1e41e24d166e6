"""Reading DCP's files without executing code from them.

`.metadata` is a pickle. The unpickler used here accepts only the names of DCP's own types. It creates inert records,
which are checked and then converted to DCP's types. Shards are read with `weights_only=True`. Entries of bytes, which
DCP would unpickle, are refused: bigtrain's checkpoints hold only tensors.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from bigtrain.checkpoint.shards import METADATA_NAME
from bigtrain.config import CorruptionError

MAX_METADATA_BYTES = 1 << 30

_DCP = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (_DCP, "Metadata"),
    (_DCP, "StorageMeta"),
    (_DCP, "TensorStorageMetadata"),
    (_DCP, "BytesStorageMetadata"),
    (_DCP, "TensorProperties"),
    (_DCP, "ChunkStorageMetadata"),
    (_DCP, "MetadataIndex"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
T = TypeVar("T")
_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")
_FRAME_BYTES = 9
"""Bytes of a FRAME opcode with its length argument."""


class _Record:
    """An inert record of an object of one of DCP's types: it keeps the object's state and runs no code."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str, default: Any = None) -> Any:
        return self.state.get(name, default) if isinstance(self.state, dict) else default


def _size(values: Any = ()) -> torch.Size:
    if not isinstance(values, (tuple, list)) or not all(type(value) is int for value in values):
        raise pickle.UnpicklingError("a size is not made of whole numbers")
    return torch.Size(values)


def _ignored(*values: Any) -> None:
    """Return None for values that DCP writes and bigtrain does not need: memory formats, layouts, the saved path."""


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _ignored,
    (_DCP, "_MEM_FORMAT_ENCODING"): _ignored,
    ("pathlib", "PosixPath"): _ignored,
    ("pathlib._local", "PosixPath"): _ignored,
}


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that creates records for DCP's own types, and refuses any other name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # New classes for each file: a crafted pickle that modifies a class does not affect the next file.
        self._types = {key: type(key[1], (_Record,), {"kind": key[1]}) for key in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._types:
            return self._types[module, name]
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not one of DCP's types")

    def persistent_load(self, key: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside itself")


def read_metadata(directory: Path) -> Metadata:
    """Read DCP's `.metadata` of a checkpoint that holds tensors only.

    Args:
        directory: The directory of one step.

    Raises:
        CorruptionError: The file is missing, too large or malformed, names a type that is not DCP's, or has entries of
            bytes.
    """
    path = directory / METADATA_NAME
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise CorruptionError(f"{METADATA_NAME} is over {MAX_METADATA_BYTES} bytes", str(path))
        data = path.read_bytes()
        root = _MetadataUnpickler(io.BytesIO(_checked(data))).load()
        return _as_metadata(root)
    except CorruptionError:
        raise
    except Exception as error:
        # A damaged pickle may raise almost any exception: AttributeError, KeyError, MemoryError, struct.error ...
        raise CorruptionError(
            f"{METADATA_NAME} is refused: {error}",
            str(path),
            "Use another checkpoint: bigtrain did not write this one.",
        ) from error


def _checked(data: bytes) -> bytes:
    """Check a pickle's opcodes, and return the pickle with one frame around all of them.

    A memo of four billion entries, or a byte array, makes the unpickler allocate memory that it does not fill. DCP's
    own pickles have neither, so both are refused. If a frame begins inside another frame and ends beyond it, the
    unpickler drops the rest of the first. It would then execute other opcodes than those checked here. With a single
    frame, it executes exactly the checked opcodes.
    """
    pieces: list[bytes] = []
    begin = 0
    for opcode, argument, found in pickletools.genops(data):
        place = found or 0
        if opcode.name == "BYTEARRAY8" or (opcode.name in _MEMO and int(argument or 0) > len(data)):
            raise pickle.UnpicklingError(f"it requests memory that it does not fill ({opcode.name} at byte {place})")
        if opcode.name == "FRAME":
            pieces.append(data[begin:place])
            begin = place + _FRAME_BYTES
    pieces.append(data[begin:])
    size = sum(map(len, pieces)).to_bytes(_FRAME_BYTES - 1, "little")
    return b"".join([pickle.PROTO, b"\x04", pickle.FRAME, size, *pieces])


def _as_metadata(root: Any) -> Metadata:
    root = _of(root, "Metadata")
    tensors: dict[str, Any] = {}
    for name, entry in _expect(root.field("state_dict_metadata"), dict).items():
        if getattr(entry, "kind", None) == "BytesStorageMetadata":
            raise pickle.UnpicklingError(f"{name!r} is an entry of bytes, not a tensor")
        entry = _of(entry, "TensorStorageMetadata")
        dtype = _expect(_of(entry.field("properties"), "TensorProperties").state, tuple)[0]
        tensors[_expect(name, str)] = TensorStorageMetadata(
            properties=TensorProperties(dtype=_expect(dtype, torch.dtype)),
            size=_expect(entry.field("size"), torch.Size),
            chunks=[_as_chunk(chunk) for chunk in _expect(entry.field("chunks"), list)],
        )
    places: dict[MetadataIndex, _StorageInfo] = {}
    for index, place in _expect(root.field("storage_data"), dict).items():
        places[_as_index(index)] = _as_place(place)
    return Metadata(state_dict_metadata=tensors, storage_data=places, storage_meta=StorageMeta())


def _as_chunk(chunk: Any) -> ChunkStorageMetadata:
    chunk = _of(chunk, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_expect(chunk.field("offsets"), torch.Size), _expect(chunk.field("sizes"), torch.Size))


def _as_index(index: Any) -> MetadataIndex:
    index = _of(index, "MetadataIndex")
    return MetadataIndex(_expect(index.field("fqn"), str), _expect(index.field("offset"), torch.Size))


def _as_place(place: Any) -> _StorageInfo:
    place = _of(place, "_StorageInfo")
    name = _expect(place.field("relative_path"), str)
    if PurePosixPath(name).name != name or name in (".", ".."):
        raise pickle.UnpicklingError(f"it points to {name!r}, outside its directory")
    if place.field("transform_descriptors"):
        raise pickle.UnpicklingError("it requires stream transforms")
    return _StorageInfo(name, _expect(place.field("offset"), int), _expect(place.field("length"), int))


def _of(value: Any, kind: str) -> _Record:
    if not isinstance(value, _Record) or getattr(value, "kind", None) != kind:
        raise pickle.UnpicklingError(f"a {type(value).__name__} was found where a {kind} is expected")
    return value


def _expect(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise pickle.UnpicklingError(f"a {type(value).__name__} was found where a {kind.__name__} is expected")
    return value


class SafeReader(StorageReader):
    """A DCP storage reader of a local directory that never executes code from its files.

    Args:
        path: The directory of one step.
        files: Names of the files that may be opened: those that have been verified. None: any file in `path`.
    """

    def __init__(self, path: str | os.PathLike[str], files: Collection[str] | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self._files = files
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.path, self._metadata = Path(checkpoint_id), None

    # Not "**kwargs": if a parameter has that name, DCP also reads a rank-local metadata file.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Read and check DCP's metadata at the first call; later calls return the same object.

        Raises:
            CorruptionError: The file is damaged or refused; see `bigtrain.checkpoint.reader.read_metadata`.
        """
        if self._metadata is None:
            self._metadata = read_metadata(self.path)
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **options: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the plan's items into the planner's tensors: file by file, in order of their offsets."""
        places = self.read_metadata().storage_data
        per_file: dict[str, list[tuple[_StorageInfo, ReadItem]]] = {}
        for item in plan.items:
            place = places.get(item.storage_index)
            if place is None:
                raise CorruptionError(f"{item.storage_index.fqn} is not stored in any file", str(self.path))
            per_file.setdefault(place.relative_path, []).append((place, item))
        for name, requests in per_file.items():
            if self._files is not None and name not in self._files:
                raise CorruptionError(f"{METADATA_NAME} points to {name}, which the manifest does not list")
            with open(self.path / name, "rb") as file:
                for place, item in sorted(requests, key=lambda request: request[0].offset):
                    self._read_item(file, place, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, file: io.BufferedReader, place: _StorageInfo, item: ReadItem, planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        if item.type == LoadItemType.BYTE_IO:
            raise CorruptionError(f"{name} is an entry of bytes, not a tensor", str(self.path))
        file.seek(place.offset)
        try:
            saved = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        except Exception as error:
            # As above: a damaged zip archive, or a pickle in it, may raise almost any exception.
            raise CorruptionError(f"{name} cannot be read: {error}", str(self.path / place.relative_path)) from error
        expected = cast(TensorStorageMetadata, self.read_metadata().state_dict_metadata[name])
        if type(saved) is not Tensor or saved.dtype != expected.properties.dtype:
            raise CorruptionError(f"{name} is not a tensor of the expected dtype", str(self.path / place.relative_path))
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            saved = saved.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(saved)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()
