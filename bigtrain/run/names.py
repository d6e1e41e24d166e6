"""File names in a run directory, equal for all runs, and the pattern of a run's name."""

from __future__ import annotations

import re
from typing import Final

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

CONFIG: Final = "config.yaml"
"""File of the resolved config."""

RECORD: Final = "run.json"
"""File of the recipe and the identity, written at the run's first start."""

MODEL: Final = "model.json"
"""File of the model of an imported checkpoint; `checkpoint import` writes it instead of CONFIG and RECORD."""

LEASE: Final = "lease.json"
"""File that names the process that may write to the directory."""

FORECAST: Final = "forecast.json"
"""File of a forecast made before the run, with which the run's results are compared."""

METRICS: Final = "metrics.jsonl"
EVENTS: Final = "events.jsonl"

SAMPLES: Final = "samples.jsonl"
"""File of the log of consumed samples."""

CHECKPOINTS: Final = "checkpoints"
"""Directory of the checkpoints."""

LATEST: Final = "LATEST"
"""File in CHECKPOINTS that names the newest published checkpoint."""

PICTURES: Final = "pictures"
"""Directory of the images that the callback `pictures` renders."""

PICTURE: Final = re.compile(r"(?P<step>\d{8,})-(?P<title>[a-z0-9-]+)\.png")
"""Name of a file in PICTURES: the step, and the title in lower case."""

LOGS: Final = "logs"
"""Directory of the ranks' and agents' logs."""
