from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.data.formats.documents import READ_BYTES, documents, documents_of, parts, sources


def read(*inputs: Path, key: str = "text") -> list[tuple[str, str]]:
    return [(document.name, "".join(document.pieces())) for document in documents(inputs, key)]


def test_a_directory_is_read_by_sorted_path_without_hidden_empty_and_other_files(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "b", "a/z.md": "z", "a/c.py": "c", "a/empty.txt": "", ".git/x.txt": "no", "x.so": "no",
        "__pycache__/y.py": "no", "lines.jsonl": '{"text": "l"}\n',
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == [("a/c.py", "c"), ("a/z.md", "z"), ("b.txt", "b"), ("lines.jsonl:1", "l")]


def test_a_byte_order_mark_is_dropped_and_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "x"}\n\n{"body": ""}\n{"body": "y"}')
    assert read(tmp_path / "a.txt") == [("a.txt", "one\r\ntwo")]
    assert read(tmp_path / "b.jsonl", key="body") == [("b.jsonl:1", "x"), ("b.jsonl:4", "y")]


def test_a_character_across_two_reads_is_whole(tmp_path: Path) -> None:
    text = "a" * (READ_BYTES - 1) + "é" + "b" * 10
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.txt")[0][1] == text


@pytest.mark.parametrize(
    ("name", "data", "message", "where"),
    [
        ("a.txt", b"", "empty", "a.txt"),
        ("a.txt", b"ab\0cd", "binary", "byte 2"),
        ("a.txt", b"abc\xff", "UTF-8", "byte 3"),
        ("a.txt", b"\xef\xbb\xbfabc\xc3", "UTF-8", "byte 6"),
        ("a.txt", b"a" * READ_BYTES + b"\xff", "UTF-8", f"byte {READ_BYTES}"),
        ("a.txt", b"a" * (READ_BYTES - 1) + b"\xc3(", "UTF-8", f"byte {READ_BYTES - 1}"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "not JSON", "line 2"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "not a JSON object", "line 2"),
        ("a.jsonl", b'{"body": "a"}\n', "no text under 'text'", "line 1"),
        ("a.jsonl", b'{"text": 5}\n', "no text under 'text'", "line 1"),
        ("a.jsonl", b'{"text": "\xff"}\n', "UTF-8", "line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "an unpaired surrogate", "line 1"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "nested too deeply", "line 1"),
    ],
)
def test_bad_input_is_named_with_its_place(tmp_path: Path, name: str, data: bytes, message: str, where: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value.where)
    assert str(caught.value.where).endswith(where) or f"{where}," in str(caught.value.where)


def test_a_missing_path_and_a_directory_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="holds no text"):
        read(tmp_path)
    with pytest.raises(UserError, match="no input"):
        read()


def texts_of(*inputs: Path | str) -> list[str]:
    return ["".join(document.pieces()) for document in documents(inputs)]


def gzipped(path: Path, data: bytes) -> Path:
    with gzip.open(path, "wb") as file:
        file.write(data)
    return path


def test_compressed_files_hold_what_plain_ones_hold(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    gzipped(tmp_path / "a.jsonl.gz", lines)
    gzipped(tmp_path / "b.txt.gz", "thr\u00e9e".encode())
    with pyarrow.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as file:
        file.write(lines)
    assert texts_of(tmp_path) == ["one", "two", "thr\u00e9e", "one", "two"]
    assert texts_of(str(tmp_path / "*.jsonl.*")) == ["one", "two", "one", "two"]


def test_the_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", "", "two", "three"], "number": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert texts_of(tmp_path / "a.parquet") == ["one", "two", "three"]
    (source,) = sources([tmp_path / "a.parquet"])
    assert [[document.text for document in documents_of(part)] for part in parts(source, 1)] == [
        ["one", "two"],
        ["three"],
    ]
    with pytest.raises(UserError, match="no column 'words'"):
        list(documents([tmp_path / "a.parquet"], key="words"))
    with pytest.raises(UserError, match="row 1") as caught:
        list(documents([tmp_path / "a.parquet"], key="number"))
    assert "row 1" in str(caught.value)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        list(documents([tmp_path / "b.parquet"]))


@pytest.mark.parametrize("size", [1, 3, 17, 40, 1000])
def test_the_parts_of_a_file_of_lines_hold_each_line_once(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" * (1 + length % 2) for length in range(1, 30)))
    (source,) = sources([path])
    found = [document.text for part in parts(source, size) for document in documents_of(part)]
    assert found == ["x" * length for length in range(1, 30)]


def test_a_bad_line_in_the_middle_of_a_large_file_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 50 + "{\n" + '{"text": "x"}\n' * 50)
    (source,) = sources([path])
    with pytest.raises(UserError) as caught:
        [list(documents_of(part)) for part in parts(source, 100)]
    assert caught.value.where == f"{path}, line 51"


def test_the_text_of_tars_made_elsewhere_is_read(tmp_path: Path, real_data: Path) -> None:
    place = real_data / "webdataset_samples"
    assert [len(text) > 0 for text in texts_of(place / "compressed.tar")] == [True] * 3
    assert len(texts_of(place / "testgz.tar")) == 1000
    gzipped(tmp_path / "a.tar.gz", (place / "compressed.tar").read_bytes())
    assert texts_of(tmp_path / "a.tar.gz") == texts_of(place / "compressed.tar")
    with pytest.raises(UserError, match=r"no member \.txt"):
        texts_of(place / "sample.tgz")


def test_a_bomb_is_an_error_and_not_a_full_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.data.formats.compressed.FREE_BYTES", 1 << 16)
    gzipped(tmp_path / "a.txt.gz", bytes([97]) * (1 << 22))
    with pytest.raises(UserError, match="decompresses to more"):
        texts_of(tmp_path / "a.txt.gz")
    whole = (tmp_path / "a.txt.gz").read_bytes()
    for damaged in (whole[:-20], whole[:300] + b"xx" + whole[302:], b"nonsense"):
        (tmp_path / "b.txt.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|decompresses"):
            texts_of(tmp_path / "b.txt.gz")


def test_a_line_that_is_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(UserError, match="nested") as caught:
        texts_of(tmp_path / "a.jsonl")
    assert "line 1" in str(caught.value)
