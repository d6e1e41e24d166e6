"""The parts of a run, for the user's own training loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.api.config import Overrides, read_config
from bigtrain.api.runs import RUNS_DIR
from bigtrain.run import RunDirectory
from bigtrain.training.parts import TrainingParts

if TYPE_CHECKING:
    from bigtrain.run import RunConfig


def build(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Overrides = None,
    *,
    name: str | None = None,
    runs_dir: str | os.PathLike[str] = RUNS_DIR,
    plugin: str | os.PathLike[str] | Iterable[str] | None = None,
) -> TrainingParts:
    """Build the engine, the loader and the saver of a run in this process, for your own training loop.

    Under torchrun this process is one of the ranks; otherwise it is the only rank. The arguments are those of `train`.
    A run that exists is loaded from its newest checkpoint.

    Raises:
        UserError: The config, the data or the run's directory has an error, or another process trains the run.
    """
    resolved = read_config(config, overrides, name=name, plugin=plugin)
    return TrainingParts(resolved, RunDirectory(Path(runs_dir) / resolved.name))
