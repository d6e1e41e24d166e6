"""The names in a run directory, the same for every run; and what a run may be called."""

from __future__ import annotations

import re
from typing import Final

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

CONFIG: Final = "config.yaml"
"""The resolved config."""

RECORD: Final = "run.json"
"""The recipe and the identity, written when the run is first started."""

MODEL: Final = "model.json"
"""The model of a checkpoint that no run has made, which `checkpoint import` writes in place of CONFIG and RECORD."""

LEASE: Final = "lease.json"
"""Who may write to the directory."""

FORECAST: Final = "forecast.json"
"""A forecast made before the run, which it is held against."""

METRICS: Final = "metrics.jsonl"
EVENTS: Final = "events.jsonl"

SAMPLES: Final = "samples.jsonl"
"""The log of consumed samples."""

CHECKPOINTS: Final = "checkpoints"
"""Folder of the checkpoints."""

LATEST: Final = "LATEST"
"""In CHECKPOINTS: the name of the newest published one."""

PICTURES: Final = "pictures"
"""Folder of what the callback `pictures` renders."""

PICTURE: Final = re.compile(r"(?P<step>\d{8,})-(?P<title>[a-z0-9-]+)\.png")
"""A file in PICTURES: the step, and the title in lower case."""

LOGS: Final = "logs"
"""Folder of the ranks' and agents' logs."""
