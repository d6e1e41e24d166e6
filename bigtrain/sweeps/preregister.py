"""`bigtrain scaling preregister`: writes the forecast of a law for a run into the run's directory, before it starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.config import UserError
from bigtrain.run import RunDirectory, load_config, names
from bigtrain.scaling.decide import predict_tasks
from bigtrain.scaling.document import read_law
from bigtrain.scaling.forecast import make_forecast
from bigtrain.storage import write_json
from bigtrain.sweeps.config import SizeFacts
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.load import load_sweep
from bigtrain.training.prepare import Prepared, prepare

SAME_RULE = 0.2
"""Largest |ln(quantity / rule)| that rounding to full steps and sequences can explain."""


def preregister_run(
    law: Path, config: Path, overrides: list[str], name: str | None, runs_dir: Path, counted: str, tasks: str | None
) -> dict[str, Any]:
    """Record what a law predicts for a run, before the run starts.

    Args:
        law: law.json, or the directory that holds it.
        config: The run's YAML.
        overrides: key=value pairs that override keys of the YAML.
        name: Name of the run; None: the name in the YAML.
        runs_dir: The directory that will hold the run's directory.
        counted: Which parameters N counts in the law: "without_embeddings" or "total".
        tasks: Checkpoints of a ladder with downstream tasks, in the form that `predict_tasks` takes; None: no tasks.

    Returns:
        The forecast, with the run's name and the path of the file written; plain values for JSON.

    Raises:
        UserError: The config is wrong, the run has started or already has a forecast, or the law gives no loss for it.
    """
    loaded = load_config(config, overrides, name)
    prepared = prepare(loaded)
    model = loaded.model
    count = model.parameter_count if counted == "total" else model.parameter_count_without_embeddings
    params = float(count(prepared.outputs))
    tokens = float(prepared.total_steps * prepared.batch_sequences * prepared.context)
    found = predict_tasks(tasks, params, tokens, [], None, None, 0)["tasks"] if tasks else []
    forecast = make_forecast(law, params, tokens, prepared.total_steps, found, loaded.seed)
    forecast["highest_lr"] = max(prepared.schedule.lr(step) for step in range(prepared.total_steps))
    forecast["warnings"] += other_recipe(law, prepared, params, loaded.model.plain())
    path = preregister(RunDirectory(runs_dir / loaded.name), forecast)
    return {**forecast, "run": loaded.name, "files": [str(path)]}


def other_recipe(law: Path, prepared: Prepared, params: float, model: Mapping[str, Any]) -> list[str]:
    """Warnings about a run whose learning rate, batch, warm-up or decay differ from the rules of the law's sweep.

    The forecast of the law then holds for a run by the sweep's rules, not for this run.

    Args:
        law: law.json, or the directory that holds it.
        prepared: The run with its data and schedule.
        params: The run's N, counted as the law counts it.
        model: The run's section `model`.
    """
    file = SweepDirectory(Path(read_law(law)["source"]["name"])).config
    if not file.exists():
        return []
    ladder = load_sweep(file).config.ladder
    batch = float(prepared.batch_sequences * prepared.context)
    rates = [prepared.schedule.lr(step) for step in range(prepared.total_steps)]
    peak = max(rates)
    decay = sum(1 for rate in rates[prepared.schedule.warmup_steps :] if rate < peak * (1 - 1e-9)) / len(rates)
    facts = SizeFacts(int(params), model, int(batch))
    found = []
    for what, own, of in (
        ("learning rate", peak, ladder.lr.of), ("batch in tokens", batch, ladder.batch.of),
        ("warm-up in tokens", prepared.schedule.warmup_steps * batch, ladder.warmup.of),
        ("share of steps in the decay", decay, lambda size: ladder.decay),
    ):  # fmt: skip
        try:
            rule = of(facts)
        except ValueError as error:
            found.append(f"the sweep's rule gives this run no {what}: {error}")
            continue
        if own <= 0 or abs(math.log(own / rule)) > SAME_RULE:
            found.append(f"the run's {what} is {own:.4g}, by the sweep's rule {rule:.4g}: the forecast is of that rule")
    return found


def preregister(directory: RunDirectory, forecast: dict[str, Any]) -> Path:
    """Write a forecast into the directory of a run that has not started.

    Raises:
        UserError: The run has started, or it already has a forecast.
    """
    path = directory.path / names.FORECAST
    if directory.exists():
        raise UserError(
            f"The run '{directory.name}' has started: a forecast must be made before the start", str(directory.path),
            "Give the run another --name.",
        )  # fmt: skip
    if path.exists():
        raise UserError(
            f"The run '{directory.name}' has a forecast of {json.loads(path.read_text())['created']}", str(path),
            "Remove the file to make another, or give the run another --name.",
        )  # fmt: skip
    directory.path.mkdir(parents=True, exist_ok=True)
    write_json(path, forecast)
    return path
