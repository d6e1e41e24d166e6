"""Held-out losses of a checkpoint, or of weights without a run, with any layout and engine that can load them.

A rank is a process `python -m bigtrain.training.evaluate REQUEST`; several ranks have torchrun's environment variables.
REQUEST is a JSON file (`Request`). Rank 0 writes the result into the same directory.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bigtrain.config import UserError, yaml_file
from bigtrain.config.plugin import plugin_of_launcher
from bigtrain.data.augmenter import with_augmented_size
from bigtrain.data.index import ShardIndex
from bigtrain.data.streaming.store import open_index
from bigtrain.run import RECIPE, ExitCode, RunConfig, RunDirectory, load_config
from bigtrain.storage import write_json
from bigtrain.training.config import InitConfig
from bigtrain.training.prepare import check_engine, loader_options, pass_context
from bigtrain.training.weights import LONGEST, Weights

logger = logging.getLogger(__name__)

ALL: Final = 1 << 40
"""A number of batches that is larger than any set has."""
MAY_CHANGE: Final = ("batch", "precision", "data.document_mask")
"""Keys of the recipe that an evaluation may change."""


@dataclass(frozen=True)
class Request:
    """The weights to evaluate, and the data to evaluate them on."""

    config: str
    """Path of the config file, whose `init.source` names the weights."""
    data: dict[str, str]
    """Shard directories by name."""
    outputs: int
    """Size of the vocabulary, or number of classes."""
    batches: int = ALL
    sequences: int | None = None
    tasks: tuple[str, ...] = ()
    """Files of requests (`training.tasks`)."""


def of_run(
    run: RunDirectory, step: int, overrides: Sequence[str], data: Mapping[str, ShardIndex]
) -> tuple[RunConfig, int]:
    """The config that evaluates a run's checkpoint, and the size of its vocabulary.

    Raises:
        UserError: An override changes what was trained, or the data has another tokenizer than the training data.
    """
    _refuse_recipe_keys(overrides)
    config = load_config(run.config, list(overrides))
    first = next(iter(data.values()))
    outputs = first.vocab_size
    try:
        train = open_index(next(iter(config.data.places("train").values())), config.streaming)
    except UserError as error:
        logger.warning("the tokenizer of the data is not compared with that of the training: %s", error.what)
    else:
        outputs = train.vocab_size
        for index in data.values():
            train.require_same_tokens(index)
    init = InitConfig(source=f"{run.path.absolute()}@{step}")
    alone = config.checkpoint.model_copy(update={"storage": None})
    return config.model_copy(update={"init": init, "checkpoint": alone}), outputs


def of_weights(weights: Weights, overrides: Sequence[str], data: Mapping[str, ShardIndex]) -> tuple[RunConfig, int]:
    """A config that evaluates weights without a run, and the size of the vocabulary to build the model with.

    If bigtrain has a family of this shape, a native model is used, in any layout; otherwise a model of transformers.

    Raises:
        UserError: The vocabulary of the data is larger than that of the model.
    """
    first = next(iter(data.values()))
    model = weights.keys | {"context": min(LONGEST, weights.keys["context"])}
    document: dict[str, Any] = {
        "name": "evaluation",
        "model": model,
        "data": {"train": first.place},
        "batch": {"size": 8},
        "duration": "1 steps",
        "precision": "fp32",
    }
    is_native = weights.source is not None
    document |= {"init": {"source": weights.source}} if is_native else {"engine": {"name": "accelerate"}}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.yaml"
        path.write_text(yaml_file.dump(document))
        config = load_config(path, list(overrides))
    for index in data.values():
        if index.vocab_size > weights.rows:
            raise UserError(
                f"The data has {index.vocab_size} different tokens, but the model has {weights.rows}",
                index.place,
                "Pack the data with the tokenizer of the model.",
            )
    return config, weights.rows if is_native else first.vocab_size


def _refuse_recipe_keys(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if key.split(".")[0] in RECIPE and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"'{key}' is a key of the training, which an evaluation cannot change",
                fix="Override layout, engine, precision, batch or data.document_mask.",
            )


def measure(request: Request) -> dict[str, dict[str, float | None]]:
    """Evaluate a request as one of its ranks. Collective.

    Returns:
        Results by the name of each set, and by "all" for all sets together: `loss` in the model's
        unit, and for models that predict text `perplexity` and `bits_per_byte`. The key "task NAME" holds what
        `Scorer.score` returns for a task.
    """
    from bigtrain.data.loader import EvaluationLoader
    from bigtrain.parallel.mesh import Ranks
    from bigtrain.training.evaluation import Evaluation, HeldOutSet
    from bigtrain.training.evaluators.loss import LossConfig
    from bigtrain.training.restoring import Restoring

    config = load_config(Path(request.config))
    indexes = {name: open_index(place, config.streaming) for name, place in request.data.items()}
    of_tokens = all(index.of_tokens for index in indexes.values())
    context = config.model.context if of_tokens else 1
    engine = config.engine.build(
        config.model, request.outputs, config.optimizer, layout=config.layout, precision=config.precision,
        seed=config.seed, ranks=Ranks.from_environment(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as nothing:
        Restoring(engine, config, RunDirectory(nothing), lambda event, **fields: None).start()
    options = loader_options(config, engine, config.batch.size.sequences(context), context)

    def opened(index: ShardIndex) -> EvaluationLoader:
        return EvaluationLoader(index, batches=request.batches, sequences=request.sequences, **options)

    sets = {name: HeldOutSet.of(opened, index, config.model) for name, index in indexes.items()}
    values = Evaluation(engine, [LossConfig()], sets, logger.warning).run().values
    predicts = of_tokens and config.model.predicts_text
    found = {name: _of_set(values, f"/{name}" if len(sets) > 1 else "", predicts) for name in sets}
    found |= {"all": _of_set(values, "", predicts)}
    if request.tasks:
        from bigtrain.training.requests import read_requests
        from bigtrain.training.tasks import Scorer

        requests = [one for file in request.tasks for one in read_requests(Path(file))]
        place = pass_context(config, engine, config.batch.size.sequences(context), next(iter(indexes.values())))
        scored = Scorer(requests, place.load_tokenizer()).score(place)
        found |= {f"task {name}": dict(results) for name, results in scored.items()}
    engine.close()
    return found


def _of_set(values: Mapping[str, float | None], suffix: str, predicts_text: bool) -> dict[str, float | None]:
    loss = values[f"val_loss{suffix}"]
    found = {"loss": loss}
    if predicts_text:
        found["perplexity"] = None if loss is None else math.exp(min(loss, 700.0))
    bits = values.get(f"val_bits_per_byte{suffix}")
    return found if bits is None else {**found, "bits_per_byte": bits}


def check(config: RunConfig, data: Mapping[str, ShardIndex], outputs: int, ranks: int) -> None:
    """Refuse what cannot be evaluated, before any process is started.

    Args:
        outputs: Size of the vocabulary, or number of classes.
        ranks: Number of ranks.

    Raises:
        UserError: The model takes another kind of data, or the engine, the layout or the number of ranks does not fit.
    """
    model = config.model
    for index in data.values():
        if model.data_kind not in (index.kind, index.sample_kind.gives):
            raise UserError(f"The shards hold {index.kind}, but the model takes {model.data_kind}", index.place)
        with_augmented_size(config.data.augment, index)
    check_engine(config)
    try:
        config.layout.check(model, outputs)
        config.layout.mesh(ranks)
    except ValueError as error:
        raise UserError(str(error), fix="Change --nproc, or the layout, such as layout.tp=1.") from None


def write_request(place: Path, config: RunConfig, request: Request) -> Path:
    """Write a request and its config into a directory, and return the path of the request."""
    path = place / "request.json"
    (place / request.config).write_text(yaml_file.dump(config.plain()))
    write_json(path, {**asdict(request), "config": str(place / request.config)})
    return path


def result_of(request: Path) -> Path:
    """The path to which rank 0 writes the result of a request."""
    return request.with_name("result.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank to its end, and return a code of `ExitCode`."""
    import os

    (path,) = sys.argv[1:] if arguments is None else arguments
    plugin_of_launcher()
    try:
        found = measure(Request(**json.loads(Path(path).read_text())))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if os.environ.get("RANK", "0") == "0":
        write_json(result_of(Path(path)), found)
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
