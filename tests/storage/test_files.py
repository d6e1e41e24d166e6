"""Files are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import xxhash

from bigtrain import storage
from bigtrain.storage import hashes

KILLED_BEFORE_THE_RENAME = """
import os, signal, sys
from bigtrain import storage
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
storage.write_atomic(sys.argv[1], b"new" * 100_000)
"""


def test_a_kill_between_write_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")
    process = subprocess.run([sys.executable, "-c", KILLED_BEFORE_THE_RENAME, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    leavings = [other for other in tmp_path.iterdir() if other != path]
    assert len(leavings) == 1, "the process died after it had written"
    assert leavings[0].name.startswith(".file.tmp-")
    storage.write_atomic(path, "newer")
    assert path.read_text() == "newer"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    storage.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        storage.write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        storage.write_atomic(path, object())  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_hash_is_that_of_all_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytes(range(256)) * (hashes.CHUNK_BYTES // 256 * 2) + b"end"
    path.write_bytes(data)
    assert storage.hash_file(path) == f"xxh3:{xxhash.xxh3_128(data).hexdigest()}"
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    path.write_bytes(changed)
    assert storage.hash_file(path) != f"xxh3:{xxhash.xxh3_128(data).hexdigest()}"
    assert storage.hash_text("é") == f"sha256:{hashlib.sha256('é'.encode()).hexdigest()}"


def test_lines_read_back_and_a_torn_tail_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert list(storage.read_lines(path)) == []
    lines = [{"step": step, "text": "a\nb é"} for step in range(3)]
    for line in lines:
        storage.append_line(path, line)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert list(storage.read_lines(path)) == lines[: whole[:cut].count(b"\n")]


def test_a_line_after_a_torn_tail_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "los')
    storage.append_line(path, {"step": 3})
    assert [line["step"] for line in storage.read_lines(path)] == [1, 3]


@pytest.mark.parametrize("tail", [b"", b'{"step": 9', b"not json\n", b"[1]\n", b"\xff\xfe\n"])
def test_cutting_keeps_the_leading_lines_and_no_torn_tail(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [b'{"step": %d}\n' % step for step in range(1, 6)]
    path.write_bytes(b"".join(lines) + tail)
    storage.cut_lines(path, keep=lambda line: line["step"] <= 3)
    assert path.read_bytes() == b"".join(lines[:3])
    storage.append_line(path, {"step": 4})
    storage.cut_lines(path, keep=lambda line: True)
    assert [line["step"] for line in storage.read_lines(path)] == [1, 2, 3, 4]


def test_cutting_only_a_torn_tail_keeps_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\nnot json\n{"step": 2}\n{"st')
    storage.cut_lines(path, keep=lambda line: True)
    assert path.read_bytes() == b'{"step": 1}\nnot json\n{"step": 2}\n'
    storage.cut_lines(tmp_path / "absent", keep=lambda line: True)
    assert not (tmp_path / "absent").exists()


def append_many(path: Path, writer: int) -> None:
    for number in range(100):
        storage.append_line(path, {"writer": writer, "number": number, "text": "x" * 500})


def test_several_processes_share_a_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(append_many, [path] * 3, range(3)))
    lines = list(storage.read_lines(path))
    assert len(lines) == 300
    for writer in range(3):
        assert [line["number"] for line in lines if line["writer"] == writer] == list(range(100))


def test_lines_wait_in_order_while_they_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = storage.LineLog(tmp_path / "later" / "log.jsonl")
    for number in range(3):
        log.append({"number": number})
    assert len(caplog.records) == 1, "one warning, not one a line"
    (tmp_path / "later").mkdir()
    log.append({"number": 3})
    assert [value["number"] for value in storage.read_lines(log.path)] == [0, 1, 2, 3]
