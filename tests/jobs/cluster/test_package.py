"""What a submission carries, and how logs are followed: without a cluster."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.jobs.cluster import package
from bigtrain.jobs.cluster.package import (
    WORK_NAME,
    Request,
    Script,
    directory_archive,
    make_package,
    source_package,
)
from bigtrain.jobs.cluster.workplace import place, sees
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.run import RunDirectory


def test_the_source_package_is_the_package_alone_and_always_the_same() -> None:
    first, second = source_package(), source_package()
    assert first == second
    names = zipfile.ZipFile(io.BytesIO(first.data)).namelist()
    assert "bigtrain/jobs/cluster/driver.py" in names
    assert "bigtrain/py.typed" in names
    assert all(name.startswith("bigtrain/") and "__pycache__" not in name for name in names)
    assert make_package([("a", b"1")]).name != make_package([("a", b"2")]).name


def test_a_request_survives_the_way(tmp_path: Path) -> None:
    request = Request(
        "a-0", "a", "/runs", 1.5, {"ray": "2"}, script=Script("t.py", ScriptCall("t.py", ["--x"]), "0" * 64)
    )
    path = tmp_path / "request.json"
    path.write_bytes(request.dump())
    assert Request.load(path) == request


def names_of(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return opened.getnames()


def test_modes_links_and_empty_directories_are_shipped(tmp_path: Path) -> None:
    source, shared = tmp_path / "source", tmp_path / "shared"
    (source / "bin").mkdir(parents=True)
    (source / "out").mkdir()
    shared.mkdir()
    (tmp_path / "common.py").write_text("outside")
    tool = source / "bin" / "tool.sh"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    (source / "latest").symlink_to("bin/tool.sh")
    (source / "common.py").symlink_to("../common.py")
    (source / "data").symlink_to(shared)
    os.link(tool, source / "second_name")
    archive = directory_archive(source)
    assert archive == directory_archive(source)
    there = tmp_path / "there"
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.extractall(there, filter="tar")
    assert os.access(there / "bin" / "tool.sh", os.X_OK)
    assert os.readlink(there / "latest") == "bin/tool.sh"
    assert not (there / "common.py").is_symlink()
    assert (there / "common.py").read_text() == "outside"
    assert os.readlink(there / "data") == str(shared)
    assert (there / "out").is_dir()
    assert (there / "second_name").read_text() == "#!/bin/sh\n"


def test_a_node_knows_the_script_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text("pass")
    digest = hashlib.sha256(b"pass").hexdigest()
    assert sees(str(tmp_path), "t.py", digest)
    assert not sees(str(tmp_path), "t.py", "0" * 64)
    assert not sees(str(tmp_path / "elsewhere"), "t.py", digest)
    assert sees(str(tmp_path), "a.module", None)


def test_what_no_node_sees_is_copied_into_the_run_and_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, received = tmp_path / "source", tmp_path / "received"
    (source / "sub").mkdir(parents=True)
    received.mkdir()
    (source / "sub" / "t.py").write_text("pass")
    (received / WORK_NAME).write_bytes(directory_archive(source))
    monkeypatch.chdir(received)
    call = ScriptCall("sub/t.py", ["--x"], "/nowhere")
    run = RunDirectory(tmp_path / "run")
    placed, seen = place(Script("sub/t.py", call, "0" * 64), run)
    assert not seen
    assert placed.directory == str(run.path / "work")
    assert Path(placed.file).read_text() == "pass"
    assert placed.arguments == ["--x"]
    # A later submission finds what an earlier one has written.
    Path(placed.directory, "snapshot").touch()
    place(Script("sub/t.py", call, "0" * 64), run)
    assert Path(placed.directory, "snapshot").exists()


def test_a_directory_of_data_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("pass")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(bytes(100))
    assert names_of(directory_archive(tmp_path)) == ["train.py"]
    monkeypatch.setattr(package, "MAX_BYTES", 100)
    (tmp_path / "data.bin").write_bytes(bytes(101))
    with pytest.raises(UserError, match="holds more than"):
        directory_archive(tmp_path)
