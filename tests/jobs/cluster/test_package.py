"""What a submission carries, and how logs are followed: without a cluster."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.jobs.cluster import package
from bigtrain.jobs.cluster.package import Request, Script, directory_files, make_package, source_package


def test_the_source_package_is_the_package_alone_and_always_the_same() -> None:
    first, second = source_package(), source_package()
    assert first == second
    names = zipfile.ZipFile(io.BytesIO(first.data)).namelist()
    assert "bigtrain/jobs/cluster/driver.py" in names
    assert "bigtrain/py.typed" in names
    assert all(name.startswith("bigtrain/") and "__pycache__" not in name for name in names)
    assert make_package([("a", b"1")]).name != make_package([("a", b"2")]).name


def test_a_request_survives_the_way(tmp_path: Path) -> None:
    request = Request("a-0", "a", "/runs", 1.5, {"ray": "2"}, script=Script("t.py", ["--x", "1"], "0" * 64))
    path = tmp_path / "request.json"
    path.write_bytes(request.dump())
    assert Request.load(path) == request


def test_a_directory_of_data_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("pass")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(bytes(100))
    assert [name for name, _ in directory_files(tmp_path)] == ["train.py"]
    monkeypatch.setattr(package, "MAX_BYTES", 100)
    (tmp_path / "data.bin").write_bytes(bytes(101))
    with pytest.raises(UserError, match="holds more than"):
        directory_files(tmp_path)
