"""Tiny sweeps as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


def tiny_sweep(shards: Path) -> dict[str, Any]:
    """A sweep of seconds: Llamas of 1.3k and 3k parameters in FP32, 256 tokens a step."""
    return {
        "name": "tiny",
        "base": {
            "model": {"arch": "llama", "context": 32, "tied": True},
            "data": {"train": str(shards / "train"), "validation": str(shards / "validation")},
            "precision": "fp32",
            "evaluation": {"every": "100000 steps", "sequences": 16},
            "checkpoint": {"every": "4 steps"},
            "tracking": {"wandb": "disabled"},
        },
        "sizes": [1300, 3000],
        "tokens_per_param": [2, 4],
        "ladder": {
            "head_width": 8, "width_multiple": 8, "aspect": 8, "batch": {"value": 256}, "warmup": {"value": 512},
            "lr": {"value": 0.003}, "decay": 0.25,
        },
        "slots": {"count": 2},
    }  # fmt: skip


@pytest.fixture
def write_sweep(tmp_path: Path, text_shards: Path) -> Callable[..., Path]:
    """Writes the tiny sweep, with whole keys replaced, to a file and returns its path."""

    def write(**keys: Any) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**tiny_sweep(text_shards), **keys}, sort_keys=False))
        return path

    return write
