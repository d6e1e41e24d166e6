from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from bigtrain.tracking.config import TrackingConfig


def test_every_is_a_number_of_steps() -> None:
    assert TrackingConfig(every="10 steps").plain()["every"] == "10 steps"
    for bad in ("5 min", "1e6 tokens", "0 steps"):
        with pytest.raises(ValidationError, match="number of steps"):
            TrackingConfig(every=bad)


def test_defaults_reload_to_the_same_section() -> None:
    config = TrackingConfig()
    assert TrackingConfig.model_validate(config.plain()) == config
    assert config.plain() == {
        "every": "1 step",
        "trackers": [],
        "wandb": "auto",
        "project": "bigtrain",
        "entity": None,
        "tags": [],
        "group": None,
        "facts": {},
    }


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    modules = [
        "config",
        "metrics",
        "redact",
        "process",
        "trackers.wandb",
        "trackers.tensorboard",
        "live",
        "status",
        "report",
        "page",
        "history",
    ]
    imports = "; ".join(f"import bigtrain.tracking.{name}" for name in modules)
    check = "; import sys; print([m for m in ('torch', 'wandb', 'plotly', 'ray', 'webdataset') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", imports + check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
