"""Text and tokens as other tools leave them: nested and listed columns, Arrow, MDS, Megatron's, llm.c's, nanoGPT's."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.documents import documents, documents_of, parts, sources
from bigtrain.data.formats.mds import mds_rows
from bigtrain.data.formats.token_files import open_token_file
from bigtrain.data.index import load_index
from bigtrain.data.kinds.tokens import TokenReader
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer

TEXTS = ["one", "zwei und drei", "four"]
EOT = 256


def read(*inputs: Path, key: str = "text") -> list[str]:
    return ["".join(document.pieces()) for document in documents(inputs, key)]


def stored(directory: Path) -> list[int]:
    """All tokens of all shards."""
    index = load_index(directory)
    reader = TokenReader(index, 1)
    found: list[int] = []
    for shard, count in enumerate(index.sequence_counts(1)):
        arrays = reader.read(np.full(count, shard), np.arange(count))
        found += [int(arrays["tokens"][0, 0]), *arrays["targets"][:, 0].tolist()]
    reader.close()
    return found


IDS = [token for text in TEXTS for token in (*text.encode(), EOT)]


def test_keys_reach_into_objects_and_lists(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"data": {"text": text, "parts": [{"t": "a"}, {"t": text}]}} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "a.jsonl", key="data.text") == TEXTS
    assert read(tmp_path / "a.jsonl", key="data.parts.1.t") == TEXTS
    assert read(tmp_path / "a.jsonl", key="data.parts.*.t") == [f"a\n{text}" for text in TEXTS]
    with pytest.raises(UserError, match=r"no text under 'data\.none'") as refused:
        read(tmp_path / "a.jsonl", key="data.none")
    assert "data.text" in str(refused.value.fix)


def test_arrow_and_parquet_of_structs_and_lists(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = pyarrow.table({
        "text": TEXTS, "data": [{"body": text} for text in TEXTS], "lines": [["x", text] for text in TEXTS],
    })  # fmt: skip
    saved = tmp_path / "saved"
    saved.mkdir()
    # The layout of `datasets`: a stream, and notes beside it.
    with ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("state.json", "dataset_info.json"):
        (saved / name).write_text("{}")
    with ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    parquet.write_table(table, tmp_path / "a.parquet")
    for place in (saved, tmp_path / "file.arrow", tmp_path / "a.parquet"):
        assert read(place) == read(place, key="data.body") == TEXTS
        assert read(place, key="lines") == [f"x\n{text}" for text in TEXTS]
    passed = PassedOver()
    list(sources([saved], passed))
    assert passed.files == {"a metadata file of an Arrow data set": ["dataset_info.json", "state.json"]}
    with pytest.raises(UserError, match="no column 'body'"):
        read(saved, key="body")
    whole = (tmp_path / "file.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="Arrow file cannot be read"):
        read(tmp_path / "cut.arrow")


def write_mds(directory: Path, columns: dict[str, tuple[str, int | None]], rows: list[list[bytes]]) -> None:
    """A shard as mosaicml-streaming's MDSWriter writes it (streaming/base/format/mds/writer.py)."""
    directory.mkdir()
    described = {
        "column_names": list(columns), "column_encodings": [kind for kind, _ in columns.values()],
        "column_sizes": [size for _, size in columns.values()], "version": 2, "format": "mds",
    }  # fmt: skip
    config = json.dumps(described, sort_keys=True).encode()
    samples = []
    for row in rows:
        sizes = [len(data) for data, (_, size) in zip(row, columns.values(), strict=True) if size is None]
        samples.append(np.asarray(sizes, "<u4").tobytes() + b"".join(row))
    offsets = np.cumsum([0, *map(len, samples)]) + 4 + 4 * (len(samples) + 1) + len(config)
    data = struct.pack("<I", len(samples)) + offsets.astype("<u4").tobytes() + config + b"".join(samples)
    (directory / "shard.00000.mds").write_bytes(data)
    shard = {**described, "raw_data": {"basename": "shard.00000.mds"}, "zip_data": None, "samples": len(rows)}
    (directory / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))


def test_mds_shards(tmp_path: Path) -> None:
    columns = {"count": ("int", 8), "meta": ("json", None), "text": ("str", None), "blob": ("pkl", None)}
    rows = [
        [struct.pack("<q", n), json.dumps({"t": text}).encode(), text.encode(), b"?"] for n, text in enumerate(TEXTS)
    ]
    write_mds(tmp_path / "mds", columns, rows)
    assert read(tmp_path / "mds") == read(tmp_path / "mds", key="meta.t") == TEXTS
    with pytest.raises(UserError, match="no text under 'none'"):
        read(tmp_path / "mds", key="none")
    with pytest.raises(UserError, match="'blob' is 'pkl'"):
        read(tmp_path / "mds", key="blob")
    write_mds(tmp_path / "blobs", {"blob": ("pkl", None), "other": ("png", None)}, [[b"?", b"?"]])
    with pytest.raises(UserError, match="not supported: 'blob' is 'pkl', 'other' is 'png'"):
        list(mds_rows(tmp_path / "blobs" / "shard.00000.mds"))
    shard = tmp_path / "mds" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-6])
    with pytest.raises(UserError, match="MDS shard cannot be read"):
        read(tmp_path / "mds")


def write_megatron(prefix: Path, documents: list[list[list[int]]], code: int = 8, dtype: str = "<u2") -> None:
    """`.bin` and `.idx` of documents of sequences of tokens, as Megatron-LM's IndexedDatasetBuilder writes them."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.asarray([len(sequence) for sequence in sequences], "<i4")
    width = np.dtype(dtype).itemsize
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<i8") * width
    bounds = np.cumsum([0, *map(len, documents)]).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    prefix.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    prefix.with_suffix(".bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4")])
def test_megatrons_documents_become_the_shards_of_their_text(tmp_path: Path, code: int, dtype: str) -> None:
    given = tmp_path / "in"
    given.mkdir()
    # The last document lacks its end of text, and the second is two sequences.
    split = [[[*b"one", EOT]], [[*b"zwei "], [*b"und drei", EOT]], [[*b"four"]]]
    write_megatron(given / "corpus", split, code, dtype)
    pack([given / "corpus.bin"], tmp_path / "out", Tokenizer())
    pack([given], tmp_path / "small", Tokenizer(), part_bytes=8)
    assert stored(tmp_path / "out" / "train") == stored(tmp_path / "small" / "train") == IDS
    index = load_index(tmp_path / "out" / "train")
    assert (index.samples, index.text_bytes) == (3, sum(len(text) for text in TEXTS))
    with pytest.raises(UserError, match=r"the index of a Megatron \.bin"):
        pack([given / "corpus.idx"], tmp_path / "no", Tokenizer())
    (given / "corpus.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="which the file does not have"):
        pack([given / "corpus.bin"], tmp_path / "no", Tokenizer())


def test_token_files_without_an_index_are_divided_at_ends_of_text(tmp_path: Path) -> None:
    plain = tmp_path / "train.bin"
    plain.write_bytes(np.asarray(IDS[:-1], "<u2").tobytes())
    with pytest.raises(UserError, match="does not state the type of its tokens"):
        pack([plain], tmp_path / "no", Tokenizer())
    pack([plain], tmp_path / "out", Tokenizer(), token_type="uint16")
    assert stored(tmp_path / "out" / "train") == IDS
    with pytest.raises(UserError, match="but the tokenizer has 257 tokens"):
        pack([plain], tmp_path / "no", Tokenizer(), token_type="uint32")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(IDS)
    (tmp_path / "llmc.bin").write_bytes(header.tobytes() + np.asarray(IDS, "<u2").tobytes())
    pack([tmp_path / "llmc.bin"], tmp_path / "llmc", Tokenizer(), validation="30%")
    assert sorted(stored(tmp_path / "llmc" / "train") + stored(tmp_path / "llmc" / "validation")) == sorted(IDS)
    (source,) = sources([plain], token_type="uint16")
    for size in (2, 7, 1000):
        found = [document for part in parts(source, size) for document in documents_of(part, eot=EOT)]
        assert [bytes(document.ids[document.ids < EOT].tolist()).decode() for document in found] == TEXTS


def test_damaged_files_are_answered(tmp_path: Path) -> None:
    row = [struct.pack("<q", 3), b'{"t": 1}', b"abc", bytes([4, 3]) + np.arange(3, dtype="<u2").tobytes()]
    columns = {"n": ("int", 8), "meta": ("json", None), "text": ("str", None), "ids": ("ndarray:uint16", None)}
    write_mds(tmp_path / "mds", columns, [row, row])
    write_megatron(tmp_path / "corpus", [[[1, 2]], [[3]]])
    shard, index = tmp_path / "mds" / "shard.00000.mds", tmp_path / "corpus.idx"
    assert list(mds_rows(shard)) == [{"n": 3, "meta": {"t": 1}, "text": "abc", "ids": [0, 1, 2]}] * 2
    random = np.random.default_rng(11)
    for file, parse in ((shard, mds_rows), (index, lambda path: [open_token_file(path.with_suffix(".bin"))])):
        whole = file.read_bytes()
        for _ in range(300):
            data = bytearray(whole[: random.integers(len(whole) + 1)] if random.random() < 0.3 else whole)
            for place in random.integers(0, max(1, len(data)), 3):
                if data:
                    data[place] = random.choice([0, 1, 255, random.integers(256)])
            file.write_bytes(data)
            with contextlib.suppress(UserError):
                list(parse(file))
