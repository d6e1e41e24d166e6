from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.config import Duration


def test_plain_values_make_the_same_section_again() -> None:
    config = CheckpointConfig(every="15 min", keep_last=5, asynchronous=False)
    assert CheckpointConfig(**config.plain()) == config
    assert CheckpointConfig().every == Duration.steps(500)


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": "3 epochs"},
        {"every": "0 steps"},
        {"every": 500},
        {"keep_last": 1},
        {"permanent": "15 min"},
        {"permanent": "0 steps"},
        {"max_failed_saves": 0},
        {"keep": 3},
    ],
)
def test_values_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CheckpointConfig(**wrong)


def test_config_manifest_and_commit_do_not_import_torch() -> None:
    code = (
        "import sys, bigtrain.checkpoint.config, bigtrain.checkpoint.manifest, bigtrain.checkpoint.commit;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
