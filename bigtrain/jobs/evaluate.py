"""`bigtrain evaluate`: held-out losses of several checkpoints, one after the other, by ranks on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.restore import newest_of, weights_at
from bigtrain.children import module_command, with_source
from bigtrain.config import UserError
from bigtrain.config.plugin import plugin_environment
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex
from bigtrain.data.streaming.store import open_index
from bigtrain.models.hf_files import HfFiles
from bigtrain.run import RunConfig, RunDirectory
from bigtrain.training.evaluate import ALL, Request, check, of_run, of_weights, result_of, write_request
from bigtrain.training.requests import read_requests
from bigtrain.training.weights import Weights

RANK = "bigtrain.training.evaluate"


def evaluate(
    checkpoints: Sequence[str],
    data: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    runs_dir: Path = Path("runs"),
    procs: int = 1,
    batches: int | None = None,
    sequences: int | None = None,
    tasks: Sequence[Path] = (),
) -> list[dict[str, Any]]:
    """Evaluate each checkpoint on each data set; the results are appended to events.jsonl of the checkpoints' runs.

    Args:
        checkpoints: Sources of weights (`weights_at`): RUN, RUN@STEP (a name, path or URL), or a directory of weights.
        data: Shard directories, or NAME=DIRECTORY.
        overrides: key=value pairs applied to each run's config; they change how the model is run, not what was trained.
        procs: Number of ranks of each evaluation.
        batches, sequences: Maximum number of global batches, and of sequences, of each set; None: the full set.
        tasks: Files of requests that are scored too (`training.tasks`), with the tokenizer of the sets.

    Returns:
        One dictionary for each checkpoint, with its name as `checkpoint`, its `step` (None for weights), and as `sets`
        what `training.evaluate.measure` returns.

    Raises:
        UserError: A checkpoint or set does not exist, a checkpoint does not fit to a set, or an evaluation failed. All
            checkpoints and sets are checked before the first evaluation starts.
    """
    indexes = _open(data)
    for file in tasks:
        read_requests(file)
    prepared = [_prepare(text, overrides, indexes, runs_dir) for text in checkpoints]
    for _, _, config, outputs in prepared:
        check(config, indexes, outputs, procs)
    rows = []
    for text, (run, step, config, outputs) in zip(checkpoints, prepared, strict=True):
        places = {name: index.place for name, index in indexes.items()}
        request = Request(
            "config.yaml", places, outputs, batches or ALL, sequences, tuple(str(file.absolute()) for file in tasks)
        )
        found = _run(config, request, procs)
        rows.append({"checkpoint": text, "step": step, "sets": found})
        if run is not None:
            run.event("evaluated", step=step, sets=found)
    return rows


def _open(data: Sequence[str]) -> dict[str, ShardIndex]:
    found: dict[str, ShardIndex] = {}
    for text in data:
        name, equals, place = text.partition("=")
        if not equals:
            name, place = text.rstrip("/").rsplit("/", 1)[-1], text
        if name in found or name == "all":
            raise UserError(f"Two sets have the name '{name}'", text, "Give it another: --data NAME=DIRECTORY.")
        found[name] = open_index(place if "://" in place else str(Path(place).absolute()), StreamingConfig())
    return found


def _prepare(
    text: str, overrides: Sequence[str], data: dict[str, ShardIndex], runs_dir: Path
) -> tuple[RunDirectory | None, int | None, RunConfig, int]:
    found = weights_at(text, runs_dir)
    if isinstance(found, HfFiles) or not found[0].exists():
        weights = Weights.of(found)
        return None, weights.step, *of_weights(weights, overrides, data)
    run, step = found
    step = newest_of(run) if step is None else step
    return run, step, *of_run(run, step, overrides, data)


def _run(config: RunConfig, request: Request, procs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bigtrain-evaluate-") as place:
        path = write_request(Path(place), config, request)
        command = module_command(RANK, str(path))
        if procs > 1:
            ranks = ("--standalone", "--nproc-per-node", str(procs), "-m", RANK, str(path))
            command = module_command("torch.distributed.run", *ranks)
        environment = with_source({"OMP_NUM_THREADS": "1", **os.environ, **plugin_environment()})
        code = subprocess.run(command, env=environment, check=False).returncode
        if code or not result_of(path).exists():
            raise UserError("The evaluation failed: see the errors of its ranks above", fix="Try again with --nproc 1.")
        found: dict[str, Any] = json.loads(result_of(path).read_text())
        return found
