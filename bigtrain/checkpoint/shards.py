"""Writing tensors shard by shard through DCP's own planner and writer interfaces.

The collectives between the two are ours (`ranks`), so that a failure on one rank becomes the same failure on
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.commit import PhaseHook
from bigtrain.checkpoint.flat import FlatPart
from bigtrain.checkpoint.manifest import FileRecord
from bigtrain.checkpoint.ranks import Ranks
from bigtrain.storage import fsync_directory, fsync_file, hash_file

METADATA_NAME = ".metadata"


def local_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of each tensor that this rank holds, sharing memory; without those that it does not write."""
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
    """What this rank could write: one item for the part of each tensor it holds, replicas included.

    Looks at shapes and placements alone. Parts of zero elements are left out where others have some.
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
    """DCP's planner over items made beforehand and the local tensors, staged or live, that they stand for."""

    def __init__(self, items: list[WriteItem], local: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items, self._local = items, local
        self._starts: dict[MetadataIndex, int] = {}
        """Where each item's values begin in the local tensor: the items of a run of elements follow each other."""
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
    """The same memory, as a tensor that is no part of a larger storage: DCP saves whole storages, so it would copy."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    # By way of bytes, since numpy has no BF16.
    return torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


def _sizes(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None  # there are no entries of bytes
    return item.tensor_data.chunk.sizes


class _Writer(FileSystemWriter):
    """One file a rank, written tensor by tensor; the metadata carry no path of this machine."""

    def __init__(self, path: Path) -> None:
        # Copying ahead would open a context on GPU 0 from the saving thread of every rank.
        # Its own syncing is of no use: up to torch 2.14 it comes before the last bytes leave Python's buffer.
        super().__init__(path, single_file_per_rank=True, sync_files=False, thread_count=1, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta | None:
        return None


def write_shards(
    ranks: Ranks, path: Path, items: list[WriteItem], local: Mapping[str, Tensor], hook: PhaseHook
) -> tuple[dict[str, FileRecord], list[str]]:
    """Write and sync this rank's part of a checkpoint into `path`, which exists. Collective.

    A tensor that several ranks hold is written by one of them, the one with least to write.

    Returns:
        Sizes and hashes of all ranks' files (on the first rank; empty elsewhere), and the names of this
        rank's.
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
    results = ranks.together(lambda: writer.write_data(planner.finish_plan(plan), planner).wait())
    hook("shards")
    ranks.together(lambda: writer.finish(planner.metadata, results) if ranks.first else None)
    names = sorted(entry.name for entry in path.glob(f"__{ranks.rank}_*"))
    names += [METADATA_NAME] if ranks.first else []

    def sync_and_hash() -> dict[str, FileRecord]:
        records = {}
        for name in names:
            fsync_file(path / name)
            records[name] = FileRecord(bytes=(path / name).stat().st_size, hash=hash_file(path / name))
        fsync_directory(path)
        return records

    records = ranks.together(sync_and_hash)
    hook("sync")
    return {name: record for part in records for name, record in part.items()}, names


def _global_plan(planner: _StagedPlanner, writer: _Writer, plans: list[SavePlan]) -> list[SavePlan]:
    planned, _ = planner.create_global_plan(plans)
    return writer.prepare_global_plan(planned)
