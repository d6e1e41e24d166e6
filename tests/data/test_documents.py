from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.data.documents import READ_BYTES, documents


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
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a character", "line 1"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "not JSON", "line 1"),
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
