"""Arrays of a fixed shape and type: indexed where they lie, or packed, and read to the bit; nothing is unpickled."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.formats.arrays import ARRAY_TYPES
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.indexing import index_directory
from bigtrain.data.inspect import inspect, verify
from bigtrain.data.kind import kind_named
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import FixedOrder
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.summary import PackSummary
from bigtrain.data.sidecar import write_sidecar

WriteTar = Callable[..., Path]


def pack_arrays(inputs: list[Path], out: Path, **options: Any) -> PackSummary:
    return kind_named("arrays").pack(inputs, out, PackOptions(**options))


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=np.asarray(values).dtype == object)
    return buffer.getvalue()


def random(dtype: str, *shape: int) -> np.ndarray:
    """Any bits at all, NaN among them."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(3).integers(0, 256, count, dtype=np.uint8).view(dtype).reshape(shape)


def batch_of(index: ShardIndex, batch: int) -> dict[str, np.ndarray]:
    with Loader(index, FixedOrder(index.sequence_counts(1)), batch_size=batch, context=1) as loader:
        return loader.batch(0).micro_batches[0]


@pytest.mark.parametrize("dtype", ARRAY_TYPES)
def test_arrays_of_a_foreign_tar_are_indexed_and_read_to_the_bit(write_tar: WriteTar, dtype: str) -> None:
    x, y = random(dtype, 3, 5, 2), random("<f8", 3)
    entries = []
    for number in range(3):
        entries += [(f"{number}.x.npy", npy(x[number])), (f"{number}.cls", str(2 * number).encode())]
        entries += [(f"{number}.y.npy", npy(y[number])), (f"{number}.json", b"{}")]
    index = index_directory(write_tar(*entries))
    assert (index.kind, index.samples, index.vocab_size, index.tokens) == ("arrays", 3, 5, 0)
    batch = batch_of(index, 4)
    assert sorted(batch) == ["keys", "labels", "weights", "x", "y"]
    assert batch["x"].dtype == np.dtype(dtype)
    assert batch["x"][:3].tobytes() == x.tobytes()
    assert batch["y"][:3].tobytes() == y.tobytes()
    assert batch["labels"].tolist() == [0, 2, 4, 0]
    assert batch["weights"].tolist() == [1, 1, 1, 0]
    assert load_index(index.directory) == index
    assert verify(index.directory).problems == []
    assert inspect(index.directory).arrays == (
        f"x {np.dtype(dtype).name} (5, 2), y float64 (), labels of 5 classes"
    )  # fmt: skip


def test_one_array_without_a_name_is_called_array(write_tar: WriteTar) -> None:
    index = index_directory(write_tar(("a.npy", npy(np.ones((2, 2), "<i8"))), ("b.npy", npy(np.zeros((2, 2), "<i8")))))
    assert batch_of(index, 2)["array"].tolist() == [[[1, 1], [1, 1]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("form", ["files of all samples", "a folder"])
def test_packed_arrays_are_what_was_given(tmp_path: Path, form: str) -> None:
    x, labels = random("<f4", 20, 3, 2), np.arange(20, dtype=np.uint8)
    source = tmp_path / "in"
    source.mkdir()
    if form == "a folder":
        for number in range(20):
            np.save(source / f"s{number}.x.npy", x[number])
            (source / f"s{number}.cls").write_text(str(labels[number]))
        inputs = [source]
    else:
        np.save(source / "x.npy", x)
        np.save(source / "labels.npy", labels)
        inputs = [source / "x.npy", source / "labels.npy"]
    summary = pack_arrays(inputs, tmp_path / "out", validation="10%", shard_bytes=8_000)
    assert {name: split.documents for name, split in summary.splits.items()} == {"train": 18, "validation": 2}
    json.dumps(summary.as_json(), allow_nan=False)
    assert verify(tmp_path / "out").problems == []
    seen = []
    for name in ("train", "validation"):
        index = load_index(tmp_path / "out" / name)
        batch = batch_of(index, index.samples)
        assert all(batch["x"][place].tobytes() == x[label].tobytes() for place, label in enumerate(batch["labels"]))
        seen += batch["labels"].tolist()
    assert sorted(seen) == list(range(20))
    assert seen != sorted(seen)


class Trap:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trapped"),)


HUGE = npy(np.zeros((2, 2), "<f4")).replace(b"(2, 2), }        ", b"(99999, 99999), }")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (("b.npy", npy(np.asarray([[Trap()]], dtype=object))), r"type \|O, which is not supported"),
        (("b.npy", npy(np.zeros((2, 3), "<f4"))), r"holds array float32 \(2, 3\), but the first .* \(2, 2\)"),
        (("b.npy", npy(np.zeros((2, 2), "<f8"))), "holds array float64"),
        (("b.npy", npy(np.zeros((2, 2), "<c8"))), "type <c8"),
        (("b.npy", npy(np.zeros((2, 2), ">f4"))), "type >f4"),
        (("b.npy", npy(np.zeros((2, 2), [("a", "<f4")]))), "type unknown"),
        (("b.npy", npy(np.asfortranarray(np.arange(4.0).reshape(2, 2)))), "column-major"),
        (("b.npy", HUGE), "39999200004 bytes; 1 to 268435456"),
        (("b.npy", npy(np.zeros((0, 2), "<f4"))), "0 bytes"),
        (("b.npy", npy(np.zeros((2, 2), "<f4"))[:-4]), "does not fit its bytes"),
        (("b.npy", b"\x93NUMPY"), "not a .npy"),
        (("b.x.npy", npy(np.zeros((2, 2), "<f4"))), "holds x float32"),
        (("b.labels.npy", npy(np.zeros((2, 2), "<f4"))), "cannot have the name 'labels'"),
        (("b.a-b.npy", npy(np.zeros((2, 2), "<f4"))), "cannot have the name 'a-b'"),
        (("b.json", b"{}"), r"no member \.npy"),
    ],
    ids=["pickle", "shape", "type", "complex", "order of bytes", "structure", "columns", "huge", "empty", "cut short",
         "no array", "name", "reserved name", "bad name", "missing"],
)  # fmt: skip
def test_arrays_that_are_not_read_are_refused_by_name(
    write_tar: WriteTar, last: tuple[str, bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write_tar(("a.npy", npy(np.zeros((2, 2), "<f4"))), last)
    with pytest.raises(UserError, match=message) as caught:
        index_directory(directory)
    assert "a.tar, sample 'b'" in str(caught.value.where)
    (tmp_path / "in").mkdir()
    if last[0] == "b.npy" and "holds" not in message:
        (tmp_path / "in" / "b.npy").write_bytes(last[1])
        (tmp_path / "in" / "c.npy").write_bytes(last[1])
        with pytest.raises(UserError, match=message):
            pack_arrays([tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x": np.zeros((4, 2), "<f4"), "y": np.zeros(3, "<f4")}, "3 samples, but x.npy has 4"),
        ({"x": np.asarray([Trap()] * 4, dtype=object)}, r"type \|O"),
        ({"x": np.zeros((4, 2), "<f4"), "labels": np.zeros(4, "<f4")}, "not a list of whole numbers"),
        ({"x": np.zeros((4, 2), "<f4"), "labels": np.full(4, -1)}, "-1 is not a class"),
        ({"x": np.asfortranarray(np.zeros((4, 2), "<f4"))}, "column-major"),
        ({"labels": np.zeros(4, "<i8")}, "no arrays"),
        ({"x": np.float32(1)}, "no axis"),
    ],
)
def test_files_of_all_samples_that_are_not_read_are_refused(
    tmp_path: Path, files: dict[str, np.ndarray], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, values in files.items():
        np.save(tmp_path / f"{name}.npy", values, allow_pickle=values.dtype == object)
    with pytest.raises(UserError, match=message):
        pack_arrays([tmp_path / f"{name}.npy" for name in files], tmp_path / "out")
    assert not (tmp_path / "trapped").exists()


def test_an_index_that_lies_about_arrays_is_refused(write_tar: WriteTar) -> None:
    index = index_directory(
        write_tar(("a.x.npy", npy(np.zeros((2, 2), "<f4"))), ("b.x.npy", npy(np.zeros((2, 2), "<f4"))))
    )
    path = index.directory / "index.json"
    value = json.loads(path.read_bytes())
    for change in (
        {"name": "../x"}, {"name": "weights"}, {"dtype": "|O"}, {"shape": [2, -2]}, {"shape": [2**30, 2**30]},
        {"shape": 4},
    ):  # fmt: skip
        path.write_text(json.dumps({**value, "arrays": [{**value["arrays"][0], **change}]}))
        with pytest.raises(CorruptionError, match="damaged"):
            load_index(index.directory)
    path.write_text(json.dumps({**value, "arrays": None}))
    with pytest.raises(CorruptionError, match="inconsistent"):
        load_index(index.directory)
    path.write_text(json.dumps(value))
    for offset in (index.shards[0].filesize - 8, 2**62, -1):
        write_sidecar(index.directory / index.shards[0].index, np.asarray([[0], [offset]]))
        with pytest.raises(CorruptionError, match="does not match its shard"):
            index.rows(0)
