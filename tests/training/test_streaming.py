"""A run whose data comes from a server, through the real command."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.data.index import load_index
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.run import ExitCode
from bigtrain.storage import read_lines

STEPS = 24
DEADLINE_S = 200.0


def _servers(name: str) -> Any:
    path = Path(__file__).parent.parent / "data" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faults, s3 = _servers("faulty_server"), _servers("faulty_s3")


@pytest.fixture
def shards(tmp_path: Path, real_data: Path) -> Path:
    """The novels in shards of 512 KiB."""
    out = tmp_path / "shards"
    pack(
        sorted((real_data / "gutenberg").glob("*.txt")),
        out,
        Tokenizer.open("bytes"),
        validation="10%",
        shard_bytes=1 << 19,
    )
    assert len(load_index(out / "train").shards) > 5
    return out


@pytest.fixture
def server(shards: Path) -> Iterator[Any]:
    with faults.serving(shards) as running:
        running.faults = {
            "*.tar": [faults.status(503), faults.truncated],
            "shard-000000.tar": [faults.status(500), faults.status(500), faults.truncated],
            "shard-000001.tar": [faults.reset, faults.wrong_length],
            "shard-000002.tar": [faults.no_range_truncated, faults.no_range],
            "shard-000003.tar": [faults.other_bytes],
            "shard-000004.tar": [faults.stall(4.0)],
        }
        yield running


@pytest.fixture
def configured(write_config: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Writes the config of a run on the data at a place, in a file of its own."""

    def write(name: str, place: str) -> Path:
        path = write_config(
            name=name,
            duration=f"{STEPS} steps",
            batch={"size": 16},
            data={"train": f"{place}/train", "validation": f"{place}/validation", "shuffle_window": 2},
            streaming={"log_samples": True, "cache_dir": str(tmp_path / "cache"), "cache": "10 MB", "timeout": "2 s"},
            checkpoint={"every": "5 steps"},
        )
        return path.rename(tmp_path / f"{name}.yaml")

    return write


def losses(run: Path) -> list[tuple[int, float, float | None]]:
    return [(row["step"], row["loss"], row.get("val_loss")) for row in read_lines(run / "metrics.jsonl")]


@pytest.mark.slow
def test_a_run_over_a_server_that_fails_and_a_kill_equals_one_from_disk_to_the_bit(
    server: Any, shards: Path, configured: Callable[..., Path], tmp_path: Path, bigtrain: Callable
) -> None:
    done = bigtrain("train", configured("disk", str(shards)))
    assert done.returncode == ExitCode.FINISHED, done.stderr
    config, run = configured("http", server.url), tmp_path / "runs" / "http"
    command = [sys.executable, "-m", "bigtrain.cli", "train", str(config)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while len(losses(run)) < 12 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = bigtrain("train", config)
    assert done.returncode == ExitCode.FINISHED, done.stderr
    disk = tmp_path / "runs" / "disk"
    assert losses(run) == losses(disk)
    assert list(read_lines(run / "samples.jsonl")) == list(read_lines(disk / "samples.jsonl"))
    state, expected = (read_tensors(place / "checkpoints", STEPS, prefix="") for place in (run, disk))
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    assert all("data_wait_s" in row for row in read_lines(run / "metrics.jsonl"))
    sizes = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".npy")]
    assert sum(sizes) <= 10_000_000


def test_data_out_of_reach_is_refused_before_a_process_is_started(
    server: Any, configured: Callable[..., Path], tmp_path: Path, bigtrain_here: Callable
) -> None:
    cases = {
        "nowhere": ("http://127.0.0.1:9", "data.train"),
        "missing": (f"{server.url}/nothing", "404"),
        "pipe": ("pipe:cat x", "scheme"),
        "secret": ("https://user:canary@127.0.0.1/x", "credentials"),
    }
    for name, (place, message) in cases.items():
        done = bigtrain_here("train", configured(name, place))
        assert done.returncode == ExitCode.USER
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert "canary" not in done.stderr + done.stdout
        assert not (tmp_path / "runs" / name).exists()


@pytest.fixture
def bucket(shards: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 endpoint that fails, before a bucket with the shards."""
    files = {f"/novels/{path.relative_to(shards)}": path.read_bytes() for path in shards.rglob("*.*")}
    s3_server.put({"/novels": b"", **files})
    spoiled = [s3.failing, s3.failing, s3.truncated, s3.reset, s3.wrong_length, s3.other_bytes, s3.stalled(4.0)]
    with s3.serving(s3_server.address, spoiled) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.mark.exhaustive
def test_a_run_over_an_s3_endpoint_that_fails_equals_one_from_disk_to_the_bit(
    bucket: Any, shards: Path, configured: Callable[..., Path], tmp_path: Path, bigtrain: Callable
) -> None:
    for name, place in (("disk", str(shards)), ("s3", "s3://novels")):
        done = bigtrain("train", configured(name, place))
        assert done.returncode == ExitCode.FINISHED, done.stderr
    disk, run = tmp_path / "runs" / "disk", tmp_path / "runs" / "s3"
    assert losses(run) == losses(disk)
    assert list(read_lines(run / "samples.jsonl")) == list(read_lines(disk / "samples.jsonl"))
    assert max(bucket.requests.values()) > 3
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"canary" not in written
