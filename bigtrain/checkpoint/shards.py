"""Writing a state's shards through DCP's planner and writer interfaces.

bigtrain's own collectives (`ranks`) connect the two instead of DCP's, so that a failure on one rank raises the same
error on all ranks.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.serialization import get_crc32_options, set_crc32_options

from bigtrain.checkpoint.commit import PhaseHook
from bigtrain.checkpoint.flat import FlatPart
from bigtrain.checkpoint.manifest import FileRecord
from bigtrain.checkpoint.ranks import RankGroup
from bigtrain.storage import fsync_directory, fsync_file
from bigtrain.storage.hashes import named, new_digest

METADATA_NAME = ".metadata"
WRITE_BUFFER_BYTES = 1 << 20
WRITE_BACK_BYTES = 16 << 20
"""After this many written bytes, the kernel is asked to write them to the disk, so that the final fsync is short."""


def local_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shard of each tensor, sharing memory with it; without tensors that this rank does not write."""
    local = {}
    for name, tensor in state.items():
        if isinstance(tensor, FlatPart):
            if tensor.written:
                local[name] = tensor.local
        elif isinstance(tensor, DTensor):
            if tensor.device_mesh.get_coordinate() is None:
                continue
            local[name] = tensor.to_local().detach()
        else:
            local[name] = tensor.detach()
    return local


def plan_items(state: Mapping[str, Tensor]) -> list[WriteItem]:
    """The write items of this rank: one for each shard that it holds, including replicas.

    The function reads only shapes and placements. Empty shards of non-empty tensors have no item.
    """
    items = []
    for name, tensor in state.items():
        if isinstance(tensor, FlatPart):
            items += tensor.__create_write_items__(name, tensor)
            continue
        kind = WriteItemType.TENSOR
        chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())
        if isinstance(tensor, DTensor):
            if tensor.device_mesh.get_coordinate() is None:
                continue
            kind = WriteItemType.SHARD
            (chunk,) = tensor.__create_chunk_list__()
        if chunk.sizes.numel() == 0 and tensor.numel() > 0:
            continue
        items.append(
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=kind,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=tensor.dtype), size=tensor.size()
                ),
            )
        )
    return items


class _StagedPlanner(DefaultSavePlanner):
    """A DCP save planner over existing write items and their local tensors (CPU copies or the originals)."""

    def __init__(self, items: list[WriteItem], local: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items, self._local = items, local
        self._starts: dict[MetadataIndex, int] = {}
        """Index of each item's first element in the local tensor. The items of a FlatPart follow each other there."""
        filled: dict[str, int] = {}
        for item in items:
            start = filled.get(item.index.fqn, 0)
            self._starts[item.index] = start
            filled[item.index.fqn] = start + _sizes(item).numel()

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self._items))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        local = self._local[write_item.index.fqn]
        sizes = _sizes(write_item)
        if local.shape != sizes:
            local = local.narrow(0, self._starts[write_item.index], sizes.numel()).view(sizes)
        return _with_storage_of_its_own(local)


def _with_storage_of_its_own(tensor: Tensor) -> Tensor:
    """The same memory as a tensor with its own storage: DCP saves complete storages, so it would copy a view."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    # Through uint8, since numpy has no BF16.
    return torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


def _sizes(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None  # bigtrain saves no entries of bytes
    return item.tensor_data.chunk.sizes


class _HashedFile(io.RawIOBase):
    """A new file that is hashed during the write, while the data are still in the processor's cache."""

    def __init__(self, path: Path, hashes: dict[str, str]) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._name, self._hashes = path.name, hashes
        self._digest = new_digest()
        self._started = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any) -> int:
        part = memoryview(data).cast("B")[:WRITE_BUFFER_BYTES]
        count = self._file.write(part)
        self._digest.update(part[:count])
        end = self._file.tell()
        if end - self._started >= WRITE_BACK_BYTES:
            os.posix_fadvise(self._file.fileno(), self._started, end - self._started, os.POSIX_FADV_DONTNEED)
            self._started = end
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._hashes[self._name] = named(self._digest)
        super().close()


class _HashingFiles(FileSystem):
    """DCP's interface to the local file system, which records the hash of each file that it writes."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            raise ValueError(f"only new files are written, not {mode!r}")
        with io.BufferedWriter(_HashedFile(Path(path), self.hashes), WRITE_BUFFER_BYTES) as stream:
            yield cast(io.IOBase, stream)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.hashes[Path(new_path).name] = self.hashes.pop(Path(path).name)


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Make torch.save skip the CRC32 of each tensor, which is not read and takes longer than the hash."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _Writer(FileSystemWriter):
    """A DCP writer of one hashed file for each rank, tensor by tensor; the metadata contain no path of this machine."""

    def __init__(self, path: Path) -> None:
        # With per_thread_copy_ahead, the saving thread of every rank would create a CUDA context on GPU 0.
        # sync_files has no use: up to torch 2.14 the sync comes before Python's buffer is flushed.
        super().__init__(path, single_file_per_rank=True, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self.files = self.fs = _HashingFiles()

    def storage_meta(self) -> StorageMeta | None:
        return None


def write_shards(
    ranks: RankGroup, path: Path, items: list[WriteItem], local: Mapping[str, Tensor], hook: PhaseHook
) -> tuple[dict[str, FileRecord], list[str]]:
    """Write and sync this rank's files of a checkpoint into the existing directory `path`. Collective.

    If several ranks hold the same shard, the rank that has the least to write writes it.

    Returns:
        The sizes and hashes of all ranks' files (on the first rank; empty on the others), and the names of this rank's
        files.
    """
    planner = _StagedPlanner(items, local)
    writer = _Writer(path)

    def local_plan() -> SavePlan:
        planner.set_up_planner({}, None, ranks.first)
        writer.set_up_storage_writer(ranks.first)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = ranks.together(local_plan)
    dealt = ranks.together(lambda: _global_plan(planner, writer, plans) if ranks.first else [])
    plan = ranks.deal(dealt[0] if ranks.first else None)
    hook("plan")
    with _without_checksums():
        results = ranks.together(lambda: writer.write_data(planner.finish_plan(plan), planner).wait())
    hook("shards")
    ranks.together(lambda: writer.finish(planner.metadata, results) if ranks.first else None)
    names = sorted(entry.name for entry in path.glob(f"__{ranks.rank}_*"))
    names += [METADATA_NAME] if ranks.first else []

    def sync() -> dict[str, FileRecord]:
        records = {}
        for name in names:
            fsync_file(path / name)
            records[name] = FileRecord(bytes=(path / name).stat().st_size, hash=writer.files.hashes[name])
        fsync_directory(path)
        return records

    records = ranks.together(sync)
    hook("sync")
    return {name: record for part in records for name, record in part.items()}, names


def _global_plan(planner: _StagedPlanner, writer: _Writer, plans: list[SavePlan]) -> list[SavePlan]:
    planned, _ = planner.create_global_plan(plans)
    return writer.prepare_global_plan(planned)
