from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from bigtrain.data.config import DataConfig, StreamingConfig


@pytest.mark.parametrize("train", [["a", "b"], [{"path": "a", "weight": 1}], {"path": "a"}, "s3://bucket/x", " "])
def test_what_is_not_one_local_directory_is_refused(train: Any) -> None:
    with pytest.raises(ValidationError, match=r"one shard|a local shard|is empty"):
        DataConfig(train=train)


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert DataConfig(train="a").plain() == {
        "train": "a", "validation": None, "document_mask": False, "shuffle_window": 8,
    }  # fmt: skip
    assert StreamingConfig().plain() == {"verify": "auto", "log_samples": False, "prefetch": 2}


def test_a_window_of_no_shard_is_refused() -> None:
    with pytest.raises(ValidationError):
        DataConfig(train="a", shuffle_window=0)


def test_importing_the_package_imports_neither_torch_nor_webdataset() -> None:
    modules = "config, documents, index, indexing, inspect, loader, order, pack, sequences, tokenizers"
    heavy = "{'torch', 'webdataset', 'PIL', 'tokenizers'}"
    code = f"import sys; from bigtrain.data import {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
