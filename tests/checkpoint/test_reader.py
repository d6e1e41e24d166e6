from __future__ import annotations

import contextlib
import io
import os
import pickle
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bigtrain.checkpoint import commit, loader
from bigtrain.checkpoint.manifest import FileRecord, read_manifest, write_manifest
from bigtrain.checkpoint.reader import SafeReader, read_metadata
from bigtrain.config import CorruptionError
from bigtrain.storage import hash_file


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def forge(directory: Path) -> None:
    """Make the manifest fit the files again, as someone with access to the disk could."""
    manifest = read_manifest(directory)
    files = {
        name: FileRecord(bytes=(directory / name).stat().st_size, hash=hash_file(directory / name))
        for name in manifest.files
    }
    write_manifest(directory, manifest.model_copy(update={"files": files}))


@pytest.fixture
def metadata_of(saved: Callable[..., Path]) -> tuple[Path, Any]:
    """A saved step's directory and its metadata as DCP's own objects."""
    path = saved(1) / "step_00000001"
    return path, pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 - written by this test


def test_a_pickle_planted_in_the_metadata_is_not_executed(
    metadata_of: tuple[Path, Any], tmp_path: Path, state_at: Callable[[int], dict[str, Tensor]]
) -> None:
    path, metadata = metadata_of
    trace = tmp_path / "executed"
    for place in ("planner_data", "storage_meta", "root"):
        planted = Planted(trace)
        if place != "root":
            setattr(metadata, place, planted)
        (path / ".metadata").write_bytes(pickle.dumps(planted if place == "root" else metadata))
        assert commit.verify(path) != []
        forge(path)
        assert commit.verify(path) == []
        with pytest.raises(CorruptionError, match="not one of DCP's types"):
            loader.load(path.parent, 1, state_at(0))
        with pytest.raises(CorruptionError, match="not one of DCP's types"):
            loader.find(path.parent, 1)
        assert not trace.exists()
    pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 - proves that the trap works
    assert trace.exists()


def test_a_pickle_planted_in_a_shard_is_not_executed(
    metadata_of: tuple[Path, Any], tmp_path: Path, state_at: Callable[[int], dict[str, Tensor]]
) -> None:
    path, metadata = metadata_of
    trace = tmp_path / "executed"
    shard = path / "__0_0.distcp"
    with open(shard, "ab") as file:
        start = file.tell()
        torch.save(Planted(trace), file)
        length = file.tell() - start
    for index, place in metadata.storage_data.items():
        if index.fqn == "model.weight":
            place.offset, place.length = start, length
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(path)
    with pytest.raises(CorruptionError, match=r"model\.weight cannot be read"):
        loader.load(path.parent, 1, state_at(0))
    with pytest.raises(CorruptionError, match=r"model\.weight cannot be read"):
        loader.read_tensors(path.parent, 1)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".."])
def test_metadata_cannot_point_outside_the_directory(metadata_of: tuple[Path, Any], name: str) -> None:
    path, metadata = metadata_of
    for place in metadata.storage_data.values():
        place.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptionError, match="outside its directory"):
        read_metadata(path)


def test_a_file_that_the_manifest_does_not_name_is_not_opened(
    metadata_of: tuple[Path, Any], state_at: Callable[[int], dict[str, Tensor]]
) -> None:
    path, metadata = metadata_of
    (path / "unverified").write_bytes((path / "__0_0.distcp").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "unverified"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(path)
    with pytest.raises(CorruptionError, match="does not list"):
        loader.load(path.parent, 1, state_at(0))


def test_entries_of_bytes_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"weight": torch.ones(2), "epoch": 3}, checkpoint_id=tmp_path)
    with pytest.raises(CorruptionError, match="'epoch' is an entry of bytes"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", b"\x80\x04N.", b"\x80\x04]q\x00."])
def test_damaged_metadata_is_corruption(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CorruptionError):
        read_metadata(tmp_path)


def test_the_reader_works_in_dcp_s_own_load(
    saved: Callable[..., Path], state_at: Callable[[int], dict[str, Tensor]]
) -> None:
    path = saved(4) / "step_00000004"
    target = {name: torch.zeros_like(tensor) for name, tensor in state_at(4).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, storage_reader=SafeReader(path))
    for name, tensor in state_at(4).items():
        assert torch.equal(target[name], tensor)


def test_metadata_written_by_plain_dcp_are_read(tmp_path: Path) -> None:
    tensors = {f"t.{dtype!s}": torch.ones(3, 2, dtype=dtype) for dtype in (torch.float16, torch.int64, torch.bool)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=tmp_path)
    read = loader.read_full(SafeReader(tmp_path), list(tensors))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02Nr\xff\xff\xff\x7f.", b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"."],
    ids=["a memo of two billion places", "a byte array of a terabyte"],
)
def test_metadata_takes_no_memory_that_it_does_not_fill(tmp_path: Path, content: bytes) -> None:
    """The unpickler would take it before it reads on: a few bytes could end the process."""
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CorruptionError, match=r"memory that it does not fill|only \d+ remain"):
        read_metadata(tmp_path)


def test_no_frame_hides_from_the_check_what_the_unpickler_reads(tmp_path: Path) -> None:
    """It leaves the rest of a frame where the next begins: to the check alone, what follows is the content of bytes."""
    places = 4_000_000
    hidden = b"Nr" + places.to_bytes(4, "little") + b"."
    inner = pickle.FRAME + len(hidden).to_bytes(8, "little") + pickle.SHORT_BINBYTES + bytes([len(hidden)])
    content = pickle.PROTO + b"\x04" + pickle.FRAME + len(inner).to_bytes(8, "little") + inner + hidden + b"."
    (tmp_path / ".metadata").write_bytes(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(pickle.UnpicklingError, MemoryError):  # Another Python may refuse it.
            pickle.Unpickler(io.BytesIO(content)).load()  # noqa: S301 - shows what the trap takes
        print(f"read as it is, it takes {tracemalloc.get_traced_memory()[1]:,} bytes")
        tracemalloc.reset_peak()
        with pytest.raises(CorruptionError, match="a bytes was found where a Metadata is expected"):
            read_metadata(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < places
    finally:
        tracemalloc.stop()
