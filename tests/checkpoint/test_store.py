"""Checkpoints on an object store: S3 over real HTTP, sound and failing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from bigtrain import variables
from bigtrain.checkpoint import commit, restore
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.manifest import FileRecord, Manifest, read_manifest
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunStore
from bigtrain.checkpoint.upload import Uploader
from bigtrain.config import CorruptionError, UserError
from bigtrain.run import RunDirectory
from bigtrain.storage import hash_file, objects
from bigtrain.storage.objects import Patience, RemoteError

URL = "s3://bucket/runs/tiny"
KEEP = CheckpointConfig(keep_last=2)


def _load_faults() -> Any:
    path = Path(__file__).parent.parent / "data" / "faulty_s3.py"
    spec = importlib.util.spec_from_file_location("faulty_s3", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faults = _load_faults()


@pytest.fixture
def bucket(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A sound S3 endpoint with an empty bucket."""
    monkeypatch.setattr(objects, "FIRST_BACKOFF_S", 0.01)
    s3_server.put({"/bucket": b""})
    return s3_server


@pytest.fixture
def failing(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Puts a proxy that fails before the endpoint."""
    running = []

    def begin(spoiled: list[Any], chooses: Callable[[str, str], bool]) -> Any:
        context = faults.serving(bucket.address, spoiled, chooses)
        server = context.__enter__()
        running.append(context)
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        return server

    yield begin
    for context in running:
        context.__exit__(None, None, None)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run's directory, without checkpoints."""
    directory = RunDirectory(tmp_path / "runs" / "tiny")
    directory.checkpoints.mkdir(parents=True)
    directory.config.write_text("name: tiny\n")
    directory.record.write_text(json.dumps({"format_version": 1, "identity": "i", "what": {}}))
    directory.metrics.write_text('{"step": 1}\n')
    return directory


def save(run: RunDirectory, step: int, *, permanent: bool = False, salt: int = 0, size: int = 50_000) -> Path:
    """Commit a checkpoint of two files whose bytes follow from its step."""
    temporary = run.checkpoints / commit.temporary_name(step)
    temporary.mkdir()
    files = {}
    for name, count in ((".metadata", 100), ("__0_0.distcp", size)):
        (temporary / name).write_bytes(bytes((step + salt + n * n) % 251 for n in range(count)))
        files[name] = FileRecord(bytes=count, hash=hash_file(temporary / name))
    manifest = Manifest(step=step, files=files, config_hash="c", identity="i", permanent=permanent, lease=1)
    return commit.publish(temporary, manifest)


def upload(run: RunDirectory, config: CheckpointConfig = KEEP, **options: Any) -> tuple[bool, list[Any]]:
    """One attempt to bring the store to what lies here; whether it did, and the events."""
    events: list[Any] = []
    store = RunStore(URL, Patience(timeout_s=5, retries=options.pop("retries", 6)))
    uploader = Uploader(run, store, config, on_event=lambda event, **fields: events.append((event, fields)), **options)
    done = uploader.finish()
    uploader.close()
    return done, events


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_checkpoint_comes_back_as_it_was_and_the_store_keeps_what_retention_keeps(
    bucket: Any, run: RunDirectory, tmp_path: Path
) -> None:
    for step in (1, 2, 3, 4):
        save(run, step, permanent=step == 1)
    done, events = upload(run)
    assert done
    assert [fields["step"] for event, fields in events if event == "uploaded"] == [4, 3, 1]
    store = RunStore(URL)
    assert store.committed() == [1, 3, 4]
    (tmp_path / "again").mkdir()
    assert contents(store.fetch(4, tmp_path / "again")) == contents(run.checkpoints / "step_00000004")
    save(run, 5)
    assert upload(run)[1][0][1]["pruned"] == [3]
    assert b"canary" not in b"".join(file.read_bytes() for file in run.path.rglob("*") if file.is_file())


@pytest.mark.slow
def test_an_endpoint_that_fails_ends_with_the_same_objects(
    failing: Callable[..., Any], run: RunDirectory, tmp_path: Path
) -> None:
    spoiled = [faults.failing, faults.failing, faults.half_stored, faults.cut]
    server = failing(spoiled, lambda command, name: command == "PUT" and name in ("__0_0.distcp", "manifest.json"))
    path = save(run, 1)
    done, events = upload(run, CheckpointConfig(read_back=False))
    assert (done, [event for event, _ in events]) == (True, ["uploaded"])
    assert server.requests["PUT /bucket/runs/tiny/checkpoints/step_00000001/__0_0.distcp"] == 5
    server.faults[:] = [faults.failing, faults.failing, faults.truncated, faults.reset, faults.other_bytes]
    server.requests.clear()
    server.chooses = lambda command, name: command == "GET" and name in ("__0_0.distcp", "manifest.json")
    (tmp_path / "again").mkdir()
    assert contents(RunStore(URL).fetch(1, tmp_path / "again")) == contents(path)
    assert server.requests["__0_0.distcp"] > 5


@pytest.mark.slow
def test_what_is_stored_with_other_bytes_is_found_before_it_counts_and_before_it_is_loaded(
    bucket: Any, run: RunDirectory, tmp_path: Path
) -> None:
    good, bad = save(run, 1), save(run, 2)
    upload(run)
    store = RunStore(URL)
    flipped = bytearray((bad / "__0_0.distcp").read_bytes())
    flipped[777] ^= 1
    bucket.put({"/bucket/runs/tiny/checkpoints/step_00000002/__0_0.distcp": bytes(flipped)})
    sizes = store.listing()[2]
    assert store.problems(2, sizes, hashes=False) == []
    assert store.problems(2, sizes, hashes=True) == ["__0_0.distcp does not match its hash"]
    with pytest.raises(CorruptionError, match="bytes that differ from its manifest"):
        store.fetch(2, tmp_path)
    assert list(tmp_path.glob("step_*")) == []
    lost = RunDirectory(tmp_path / "elsewhere" / "tiny")
    found, said = restore.bring_back_from(URL, lost.path.parent)
    assert "step 1 was fetched" in said
    assert "step 2" in said
    assert contents(found.checkpoints / "step_00000001") == contents(good)
    assert found.metrics.read_text() == run.metrics.read_text()
    # The same bytes that a manifest names are not assumed to be the stored ones because of their size.
    bucket.put({"/bucket/runs/tiny/checkpoints/step_00000002/manifest.json": b"{}"})
    assert upload(run)[0]
    assert store.problems(2, store.listing()[2], hashes=True) == []


@pytest.mark.slow
def test_a_kill_in_an_upload_leaves_no_checkpoint_and_the_next_attempt_sends_the_rest(
    failing: Callable[..., Any], run: RunDirectory, run_script: Callable[..., str]
) -> None:
    server = failing([], lambda command, name: command == "PUT")
    for step, phase in ((1, "object"), (2, "stored")):
        save(run, step)
        sent_before = server.requests.copy()
        run_script("kill_in_an_upload.py", run.path, URL, phase, expected={0: -9})
        assert (step in RunStore(URL).committed()) is (phase != "object")
        assert upload(run)[0]
        assert RunStore(URL).committed() == [1, 2][:step]
        sent = server.requests - sent_before
        assert all(count == 1 for name, count in sent.items() if f"step_{step:08d}" in name), sent


@pytest.mark.slow
def test_a_store_that_stays_away_is_counted_and_made_up_for(
    failing: Callable[..., Any], run: RunDirectory, tmp_path: Path
) -> None:
    server = failing([faults.failing] * 1000, lambda command, name: command == "PUT" and name == "__0_0.distcp")
    config = CheckpointConfig(max_failed_saves=2, keep_last=2)
    events: list[str] = []
    store = RunStore(URL, Patience(timeout_s=5, retries=1))
    uploader = Uploader(run, store, config, on_event=lambda event, **fields: events.append(event))
    for step in (1, 2):
        save(run, step)
        assert not uploader.finish()
        assert uploader.failures == step
    assert events == ["upload_failed", "upload_failed", "not_uploaded"]
    stopping = CheckpointConfig(max_failed_saves=2, stop_unsaved=True, asynchronous=False, storage="s3://bucket/runs")
    saver = Saver(tmp_path / "beside", stopping, uploader=uploader)
    saver.save(1, {"model.x": torch.zeros(1)}, progress={}, config_hash="", identity="")
    assert saver.must_stop
    saver.close()
    assert store.committed() == []
    server.faults.clear()
    assert uploader.finish()
    uploader.close()
    assert store.committed() == [1, 2]
    assert uploader.failures == 0


@pytest.mark.slow
def test_a_holder_that_lost_the_lease_commits_nothing(bucket: Any, run: RunDirectory) -> None:
    save(run, 1)
    done, events = upload(run, may_publish=lambda: False)
    assert not done
    assert [event for event, _ in events] == ["upload_refused"]
    assert RunStore(URL).committed() == []


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["does not match its hash", "has 1 bytes"])
def test_a_checkpoint_that_is_damaged_on_the_disk_is_reported_once_as_missing(
    bucket: Any, run: RunDirectory, problem: str
) -> None:
    save(run, 1)
    file = save(run, 2) / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[::-1] if "hash" in problem else b"x")
    events: list[Any] = []
    store = RunStore(URL)
    uploader = Uploader(run, store, KEEP, on_event=lambda event, **fields: events.append((event, fields)))
    assert not uploader.finish()
    assert not uploader.finish()
    assert sorted((event, fields["step"]) for event, fields in events) == [("upload_refused", 2), ("uploaded", 1)]
    assert problem in next(fields["cause"] for event, fields in events if event == "upload_refused")
    assert store.committed() == [1]
    file.write_bytes(content)
    assert uploader.finish()
    uploader.close()
    assert store.committed() == [1, 2]


@pytest.mark.slow
def test_a_run_that_went_back_takes_the_store_with_it(bucket: Any, run: RunDirectory) -> None:
    for step in (1, 2, 3):
        save(run, step)
        upload(run)
    commit.rewind(run.checkpoints, 1)
    path = save(run, 2, salt=5)
    assert upload(run)[0]
    store = RunStore(URL)
    assert store.committed() == [1, 2]
    assert store.manifest(2) == read_manifest(path)
    assert store.problems(2, store.listing()[2], hashes=True) == []


@pytest.mark.slow
def test_what_a_url_names_is_fetched_once_and_again_where_it_changed(
    failing: Callable[..., Any], run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.CACHE, str(tmp_path / "cache"))
    server = failing([], lambda command, name: command == "GET" and name == "__0_0.distcp")
    path = save(run, 1)
    upload(run)
    server.requests.clear()
    for _ in range(2):
        found, step = restore.checkpoint_at(f"{URL}@1", tmp_path)
        assert step == 1
        assert contents(found.checkpoints / "step_00000001") == contents(path)
    assert server.requests["__0_0.distcp"] == 1
    commit.remove(path)
    path = save(run, 1, salt=3)
    upload(run)
    found, _ = restore.checkpoint_at(URL, tmp_path)
    assert contents(found.checkpoints / "step_00000001") == contents(path)
    with pytest.raises(UserError, match="no checkpoint of step 7") as caught:
        restore.checkpoint_at(f"{URL}@7", tmp_path)
    assert caught.value.fix == "Choose one of these steps: 1."


@pytest.mark.slow
def test_a_store_that_cannot_be_used_is_named(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteError, match="no such bucket"):
        RunStore("s3://nowhere/x").check_access()
    RunStore(URL).check_access()
    assert RunStore(URL).listing() == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RemoteError, match="Could not connect"):
        RunStore("s3://bucket/y", Patience(1, 0)).check_access()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://host/x", "scheme"),
        ("/a/path", "scheme"),
        ("s3://key:canary@bucket/x", "credentials"),
        ("s3://", "bucket"),
    ],
)
def test_only_a_bucket_without_credentials_in_its_url_is_a_storage(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CheckpointConfig(storage=url)
