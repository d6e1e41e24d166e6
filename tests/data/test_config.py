from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from bigtrain.data.config import DataConfig, StreamingConfig
from bigtrain.storage.scheme import SCHEMES


@pytest.mark.parametrize("train", [["a", "b"], [{"path": " "}], {"path": "a"}, " "])
def test_what_is_no_place_is_refused(train: Any) -> None:
    with pytest.raises(ValidationError, match=r"SourceConfig|valid string|is empty"):
        DataConfig(train=train)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd", "pipe://x", "file:///data", "ftp://host/x", "hdfs://host/x", "local://x", "zip://x::http://y",
        "https://user:secret@host/x", "https://host/x?X-Amz-Signature=secret", "http:///x", "s3://", "http://a b/x",
    ],
)  # fmt: skip
def test_urls_of_other_schemes_and_with_credentials_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=r"scheme|credentials|names no") as caught:
        DataConfig(train=url)
    assert "secret" not in caught.value.errors()[0]["msg"]


def test_urls_of_allowed_schemes_lose_their_last_slash() -> None:
    for scheme in SCHEMES:
        assert DataConfig(train=f"{scheme}://place/a/").train == f"{scheme}://place/a"


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert DataConfig(train="a").plain() == {
        "train": "a", "validation": None, "document_mask": False, "shuffle_window": 8, "augment": [], "consumed": None,
    }  # fmt: skip
    assert StreamingConfig().plain() == {
        "verify": "auto", "log_samples": False, "prefetch": 2, "threads": None, "cache": 20_000_000_000,
        "cache_dir": None, "timeout": 20.0, "retries": 8,
    }  # fmt: skip
    assert StreamingConfig(cache="20 GB", timeout="1 min").timeout == 60


def test_a_window_of_no_shard_is_refused() -> None:
    with pytest.raises(ValidationError):
        DataConfig(train="a", shuffle_window=0)


def test_importing_the_package_imports_neither_torch_nor_webdataset() -> None:
    modules = ["config", "index", "indexing", "inspect", "loader", "packing.documents", "streaming.store"]
    imports = "; ".join(f"import bigtrain.data.{name}" for name in modules)
    heavy = "{'torch', 'webdataset', 'PIL', 'tokenizers', 'fsspec', 'pyarrow'}"
    code = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
