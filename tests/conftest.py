"""What all tests share: real data where it is, small shards, runs in real processes."""

from __future__ import annotations

import http.client
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.in_process import STARTS_NO_PROCESS, run_here

if TYPE_CHECKING:
    from bigtrain.testing.ranks import RankPool

# Test files run in parallel. OpenMP threads busy-wait for each other, which is slow if they outnumber the cores.
# This must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
RUN_TIMEOUT_S = 240


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes name no test: those of gzip hold the second they were made, and two workers must collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _plugins_stay_in_their_test() -> Iterator[None]:
    """What a test's plugins register is known in that test alone."""
    from bigtrain.config import registry
    from bigtrain.config.plugin import ACTIVE

    before = {point: dict(one.found) for point, one in registry.REGISTRIES.items()}
    yield
    ACTIVE.clear()
    for point, one in registry.REGISTRIES.items():
        one.found.clear()
        one.found.update(before.get(point, {}))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets: BIGTRAIN_TEST_DATA, else shared/data beside the checkout."""
    path = Path(os.environ.get("BIGTRAIN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"there is no folder of real data at {path}; set BIGTRAIN_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few modules of the standard library as bytes: train/ and validation/."""
    from bigtrain.data.packing.documents import pack
    from bigtrain.data.tokenizers import Tokenizer

    library = Path(os.__file__).parent
    names = ("abc", "bisect", "colorsys", "copy", "heapq", "keyword", "queue", "sched", "stat", "this")
    out = tmp_path_factory.mktemp("text") / "shards"
    pack([library / f"{name}.py" for name in names], out, Tokenizer.open("bytes"), validation="10%")
    return out


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of tiny models of transformers, each made once."""
    from tests.models.tiny_hf import make

    root = tmp_path_factory.mktemp("models")
    return lambda kind: root / kind if (root / kind).exists() else make(kind, root / kind)


def tiny_config(shards: Path) -> dict[str, object]:
    """A run of seconds: 4 x 32 tokens a step through a two-layer Llama in FP32."""
    return {
        "name": "tiny",
        "model": {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, "tied": True},
        "data": {"train": str(shards / "train"), "validation": str(shards / "validation")},
        "batch": {"size": 4},
        "duration": "8 steps",
        "precision": "fp32",
        "evaluation": {"every": "4 steps", "batches": 2},
        "checkpoint": {"every": "4 steps"},
        "streaming": {"log_samples": True},
        "tracking": {"wandb": "disabled"},
    }


@pytest.fixture
def write_config(tmp_path: Path, text_shards: Path) -> Callable[..., Path]:
    """Writes tiny_config, with whole sections replaced, to a file and returns its path."""

    def write(**sections: object) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**tiny_config(text_shards), **sections}, sort_keys=False))
        return path

    return write


@pytest.fixture
def bigtrain(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the `bigtrain` command in tmp_path: in a process of its own if it starts others."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        if arguments[0] in STARTS_NO_PROCESS:
            return run_here(*arguments, cwd=tmp_path)
        return subprocess.run(
            [sys.executable, "-m", "bigtrain.cli", *map(str, arguments)],
            cwd=tmp_path, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def bigtrain_here(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the `bigtrain` command in this process, in tmp_path."""
    return partial(run_here, cwd=tmp_path)


@dataclass(frozen=True)
class S3Server:
    """Moto's server: S3 over real HTTP."""

    address: tuple[str, int]

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Make buckets ("/bucket": b"") and objects ("/bucket/name"), in this order."""
        connection = http.client.HTTPConnection(*self.address)
        authorization = {"Authorization": "AWS4-HMAC-SHA256 Credential=canary-id/20260101/us-east-1/s3/aws4_request"}
        for path, data in objects.items():
            connection.request("PUT", path, data, authorization)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
        connection.close()


@pytest.fixture(scope="session")
def s3_address() -> Iterator[tuple[str, int]]:
    """Where moto's server listens."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3_server(s3_address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 endpoint without buckets that the environment names, with credentials that no file may hold."""
    s3fs = pytest.importorskip("s3fs")
    # An instance keeps the endpoint that it was made for.
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "canary-id", "AWS_SECRET_ACCESS_KEY": "canary-secret", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_address[0]}:{s3_address[1]}")
    connection = http.client.HTTPConnection(*s3_address)
    connection.request("POST", "/moto-api/reset")
    connection.getresponse().read()
    connection.close()
    return S3Server(s3_address)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to eight ranks that run a test's functions together; see `bigtrain.testing.ranks`."""
    from bigtrain.testing.ranks import RankPool

    with RankPool(8) as pool:
        yield pool
