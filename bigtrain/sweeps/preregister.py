"""`bigtrain scaling preregister`: from a law and a run's YAML to the forecast in the run's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigtrain.config import UserError
from bigtrain.run import RunDirectory, load_config, names
from bigtrain.scaling.decide import predict_tasks
from bigtrain.scaling.forecast import make_forecast
from bigtrain.storage import write_json
from bigtrain.training.prepare import prepare


def preregister_run(
    law: Path, config: Path, overrides: list[str], name: str | None, runs_dir: Path, counted: str, tasks: str | None
) -> dict[str, Any]:
    """Freeze what a law predicts of a run before it starts.

    Args:
        law: law.json, or the directory that holds it.
        config: The run's YAML.
        overrides: key=value pairs laid over it.
        name: Of the run, in place of the file's.
        runs_dir: Where the run will live.
        counted: What N counts in the law: "without_embeddings" or "total".
        tasks: Checkpoints of a ladder with tasks, as `predict_tasks` takes them.

    Raises:
        UserError: A wrong config, a run that has started, or a law that does not give its loss.
    """
    loaded = load_config(config, overrides, name)
    prepared = prepare(loaded)
    model = loaded.model
    count = model.parameter_count if counted == "total" else model.parameter_count_without_embeddings
    params = float(count(prepared.outputs))
    tokens = float(prepared.total_steps * prepared.batch_sequences * prepared.context)
    found = predict_tasks(tasks, params, tokens, [], None, None, 0)["tasks"] if tasks else []
    forecast = make_forecast(law, params, tokens, prepared.total_steps, found)
    path = preregister(RunDirectory(runs_dir / loaded.name), forecast)
    return {**forecast, "run": loaded.name, "files": [str(path)]}


def preregister(directory: RunDirectory, forecast: dict[str, Any]) -> Path:
    """Write a forecast into the directory of a run that has not started.

    Raises:
        UserError: The run has started, or has another forecast.
    """
    path = directory.path / names.FORECAST
    if directory.exists():
        raise UserError(
            f"The run '{directory.name}' has started: a forecast is made before it", str(directory.path),
            "give the run another --name",
        )  # fmt: skip
    if path.exists():
        raise UserError(
            f"The run '{directory.name}' has a forecast of {json.loads(path.read_text())['created']}", str(path),
            "remove the file to make another, or give the run another --name",
        )  # fmt: skip
    directory.path.mkdir(parents=True, exist_ok=True)
    write_json(path, forecast)
    return path
