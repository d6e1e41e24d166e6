from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from bigtrain.config import UserError
from bigtrain.data.index import load_index
from bigtrain.data.kind import kind_named
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import FixedOrder
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.summary import PackSummary


def pack_images(folder: Path, out: Path, **options: Any) -> PackSummary:
    return kind_named("images").pack([folder], out, PackOptions(**options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of twelve images, each of its class's grey."""
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.full((6, 8, 3), 50 * label + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "folder" / name / f"{number}.png")
    return tmp_path / "folder"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_folder_of_classes_becomes_images_with_labels(folder: Path, tmp_path: Path) -> None:
    summary = pack_images(folder, tmp_path / "out", image_size=4, validation="25%", shard_bytes=20_000)
    assert {name: split.documents for name, split in summary.splits.items()} == {"train": 27, "validation": 9}
    found = []
    for split in ("train", "validation"):
        index = load_index(tmp_path / "out" / split)
        index.check("always")
        assert json.loads((index.directory / "classes.json").read_text()) == ["ant", "bee", "cat"]
        assert index.image is not None
        assert (index.image.height, index.image.width, index.image.channels) == (4, 4, 3)
        with Loader(index, FixedOrder(index.sequence_counts(1)), batch_size=index.samples, context=1) as loader:
            batch = loader.batch(0).micro_batches[0]
        found += [
            (int(image[0, 0, 0]), int(label)) for image, label in zip(batch["images"], batch["labels"], strict=True)
        ]
    assert sorted(found) == [(50 * label + number, label) for label in range(3) for number in range(12)]
    assert [label for _, label in found] != sorted(label for _, label in found)


def test_classes_without_images_are_named(folder: Path, tmp_path: Path) -> None:
    for name in ("bat", "emu"):
        (folder / name).mkdir()
    pack_images(folder, tmp_path / "out")
    assert load_index(tmp_path / "out" / "train").empty_classes() == ["1 ('bat')", "4 ('emu')"]


def test_tars_of_images_with_classes_are_packed_as_folders_are(folder: Path, tmp_path: Path) -> None:
    tars = [tmp_path / f"part-{part}.tar" for part in range(2)]
    for part, place in enumerate(tars):
        with webdataset.TarWriter(str(place)) as tar:
            for label, name in enumerate(("ant", "bee", "cat")):
                for number in range(part, 12, 2):
                    image, key = (folder / name / f"{number}.png").read_bytes(), f"{name}{number}"
                    kept = {"cls": str(label)} if (part, label) != (1, 2) else {"json": {"label": label}}
                    tar.write({"__key__": key, "png": image, **kept})
            tar.write({"__key__": f"without-{part}", "png": image})
    images = kind_named("images")
    with pytest.raises(UserError) as caught:
        images.pack(tars, tmp_path / "out", PackOptions(image_size=4))
    assert "without-0" in str(caught.value)
    with pytest.raises(UserError, match="one folder with a folder for each class, or from files"):
        images.pack([*tars, folder], tmp_path / "out", PackOptions(image_size=4))
    summary = images.pack(tars, tmp_path / "out", PackOptions(image_size=4, skip_bad=2))
    assert len(summary.passed.bad) == 2
    pack_images(folder, tmp_path / "of-folder", image_size=4)
    found, expected = (_images_by_class(tmp_path / place / "train") for place in ("out", "of-folder"))
    assert found == expected


def test_parquet_files_of_images_are_packed_as_folders_are(folder: Path, tmp_path: Path) -> None:
    table, rows = tmp_path / "train.parquet", []
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(12):
            image = {"bytes": (folder / name / f"{number}.png").read_bytes(), "path": None}
            rows.append({"image": image, "label": label, "id": number})
    noted = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"]}}}}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(noted)}), table,
        row_group_size=10,
    )  # fmt: skip
    images = kind_named("images")
    images.pack([table], tmp_path / "out", PackOptions(image_size=4))
    assert load_index(tmp_path / "out" / "train").class_names == ("ant", "bee", "cat")
    pack_images(folder, tmp_path / "of-folder", image_size=4)
    found, expected = (_images_by_class(tmp_path / place / "train") for place in ("out", "of-folder"))
    assert found == expected

    rows[3]["image"] = rows[4]["label"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    with pytest.raises(UserError, match="no image"):
        images.pack([table], tmp_path / "two", PackOptions(image_size=4))
    passed = images.pack([table], tmp_path / "two", PackOptions(image_size=4, skip_bad=2)).passed
    assert [text.partition("row ")[2][:1] for text in passed.bad] == ["4", "5"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "label": 1}]), table)
    with pytest.raises(UserError, match="the columns are text, label"):
        images.pack([table], tmp_path / "three", PackOptions(image_size=4))


def _images_by_class(place: Path) -> list[tuple[int, bytes]]:
    index = load_index(place)
    with Loader(index, FixedOrder(index.sequence_counts(1)), batch_size=index.samples, context=1) as loader:
        batch = loader.batch(0).micro_batches[0]
    return sorted((int(label), image.tobytes()) for image, label in zip(batch["images"], batch["labels"], strict=True))


def test_packing_images_goes_on_after_a_kill_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pack_images(folder, tmp_path / "clean", shard_bytes=20_000)

    def killed(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_images(folder, tmp_path / "out", shard_bytes=20_000, progress=killed)
    work = tmp_path / ".out.packing" / "train"
    stamp = (work / "shard-000000.tar").stat().st_mtime_ns
    pack_images(folder, tmp_path / "out", shard_bytes=20_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    assert (tmp_path / "out" / "train" / "shard-000000.tar").stat().st_mtime_ns == stamp


def test_images_of_two_sizes_and_files_that_are_no_images_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "bee" / "bad.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a PNG or JPEG image") as caught:
        pack_images(folder, tmp_path / "out")
    assert "bad.png" in str(caught.value.where)
    summary = pack_images(folder, tmp_path / "out", skip_bad=1)
    assert [text.split(":")[0].rsplit("/")[-1] for text in summary.passed.bad] == ["bad.png"]
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "bee" / "bad.png")
    with pytest.raises(UserError, match="9 x 9"):
        pack_images(folder, tmp_path / "other", shard_bytes=20_000)
    with pytest.raises(UserError, match="no images"):
        pack_images(tmp_path / "out", tmp_path / "third")
