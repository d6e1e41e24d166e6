"""Sample kinds as an extension point: one of a user's own, and members that a decoder reads."""

from __future__ import annotations

import io
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset import TarWriter

from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.data.accounting import PassedOver
from bigtrain.data.config import StreamingConfig
from bigtrain.data.decoding import DECODERS, MemberDecoder
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.indexing import index_directory
from bigtrain.data.inspect import inspect, verify
from bigtrain.data.kind import kind_named
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.streaming.store import open_index
from bigtrain.models.batches import KINDS

SOUNDS = Path(__file__).parents[2] / "configs" / "plugin" / "sounds.py"


def wav(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(values.astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve sounds in two classes; all values of a sound are its number."""
    for number in range(12):
        path = tmp_path / "raw" / "ab"[number % 2] / f"{number:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wav(np.full(30, number)))
    return tmp_path / "raw"


def batch(index: ShardIndex, size: int, streaming: StreamingConfig | None = None) -> dict[str, np.ndarray]:
    order = SampleOrder(0, index.fingerprint, index.sequence_counts(1), 4)
    with Loader(index, order, batch_size=size, context=1, streaming=streaming) as loader:
        (found,) = loader.batch(0).micro_batches
    return found


@pytest.mark.slow
def test_a_kind_of_a_plugin_is_packed_read_and_streamed(folder: Path, tmp_path: Path, serve: Any) -> None:
    load_plugin(str(SOUNDS))
    options = {"validation": "25%", "shard_bytes": 6000}
    for workers in (1, 2):
        kind_named("sounds").pack([folder], tmp_path / f"out{workers}", PackOptions(workers=workers, **options))
    one, two = (sorted((tmp_path / f"out{workers}" / "train").iterdir()) for workers in (1, 2))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    index = load_index(tmp_path / "out1" / "train")
    assert (index.kind, index.facts, index.vocab_size) == ("sounds", {"rate": 8000, "frames": 30}, 2)
    assert len(index.shards) > 1
    found = batch(index, 9)
    numbers = np.round(found["sounds"][:, 0] * 2**15).astype(int)
    assert (numbers % 2 == found["labels"]).all()
    assert (found["sounds"] == found["sounds"][:, :1]).all()
    assert len(set(numbers.tolist())) == 9
    assert verify(index.directory).problems == []
    assert inspect(index.directory).samples == 9
    with serve(index.directory) as server:
        streaming = StreamingConfig(cache_dir=str(tmp_path / "cache"))
        remote = batch(open_index(server.url, streaming), 9, streaming)
    assert all((remote[name] == found[name]).all() for name in found)


def test_tars_of_a_plugins_kind_are_recognised(tmp_path: Path) -> None:
    load_plugin(str(SOUNDS))
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for number in range(4):
            tar.write({"__key__": str(number), "wav": wav(np.full(30 + (number == 3), number)), "cls": number})
    with pytest.raises(UserError, match="'frames': 31"):
        index_directory(tmp_path)
    passed = PassedOver(1)
    index = index_directory(tmp_path, passed=passed)
    assert (index.samples, index.vocab_size, len(passed.bad)) == (3, 3, 1)


@pytest.mark.slow
def test_shards_of_an_unknown_kind_are_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    arguments = ["data", "pack", folder, "--kind", "sounds", "--plugin", SOUNDS, "--out", tmp_path / "out"]
    subprocess.run([sys.executable, "-m", "bigtrain", *map(str, arguments)], check=True, cwd=tmp_path)
    assert "sounds" not in KINDS
    with pytest.raises(UserError, match="kind 'sounds'") as caught:
        load_index(tmp_path / "out" / "train")
    assert "--plugin" in str(caught.value.fix)
    load_plugin(str(SOUNDS))
    assert load_index(tmp_path / "out" / "train").samples == 12


@pytest.mark.parametrize(
    ("name", "arrays"), [("mpdata", "x int64 (), y int64 ()"), ("tendata", "ten_0 float64 (28, 28)")]
)
def test_tars_of_webdatasets_own_formats_are_read(name: str, arrays: str, real_data: Path, tmp_path: Path) -> None:
    from webdataset.autodecode import basichandlers
    from webdataset.tariterators import tar_file_iterator

    source = real_data / "webdataset_samples" / f"{name}.tar"
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tar").write_bytes(source.read_bytes())
    index = index_directory(tmp_path / "d")
    assert index.kind == "decoded"
    assert kind_named("decoded").describe(index).startswith(arrays)  # type: ignore[union-attr]
    found = batch(index, 100)
    with open(source, "rb") as file:
        expected = [basichandlers(one["fname"], one["data"]) for one in tar_file_iterator(file)]
    flat = [list(one.values()) if isinstance(one, dict) else one for one in expected]
    names = [info.name for info in index.arrays or ()]
    assert sorted(map(repr, zip(*(found[one] for one in names), strict=True))) == sorted(
        repr(tuple(np.asarray(value)[()] for value in sample)) for sample in flat
    )


def test_a_decoder_of_a_users_own_gives_arrays(write_tar: Callable[..., Path]) -> None:
    class Pair(MemberDecoder):
        name = "pair"

        def decode(self, data: bytes) -> Any:
            left, right = data.split()
            return {"left": float(left), "right": np.full(2, int(right))}

    entries = [(f"{number}.pair", f"{number} {number + 1}".encode()) for number in range(3)]
    directory = write_tar(*entries, ("3.pair", b"nonsense"))
    with pytest.raises(UserError, match=r"samples of pair are not supported"):
        index_directory(directory)
    DECODERS.register(Pair)
    with pytest.raises(UserError, match="cannot be decoded: ValueError"):
        index_directory(directory)
    index = index_directory(directory, passed=PassedOver(1))
    found = batch(index, 3)
    assert sorted(found["left"].tolist()) == [0, 1, 2]
    assert (found["right"] == found["left"][:, None] + 1).all()


def test_pickles_are_not_decoded(write_tar: Callable[..., Path]) -> None:
    import pickle

    for suffix in ("pyd", "pkl", "pickle", "pth"):
        with pytest.raises(UserError, match="are not supported"):
            index_directory(write_tar((f"a.{suffix}", pickle.dumps({"x": 1}))))
