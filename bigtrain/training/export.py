"""A run's weights as transformers reads them, with the tokenizer of its data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.huggingface import export_hf
from bigtrain.config import UserError
from bigtrain.data.streaming.store import open_index
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.run import RunConfig, RunDirectory, load_config
from bigtrain.training.prepare import pins

logger = logging.getLogger(__name__)


def export_run(run: RunDirectory, step: int, out: Path) -> list[Path]:
    """Write a verified checkpoint of a run as a directory for `from_pretrained`.

    The tokenizer comes along where the data has one that transformers can read, which bytes are not; where the data
    cannot be reached, the weights are written without it and a warning says so.

    Raises:
        UserError: transformers has no such model; `out` is not empty; there is no such step.
        CorruptionError: The checkpoint does not verify.
    """
    config = load_config(run.config)

    def companions(place: Path) -> dict[str, Any]:
        tokenizer = _tokenizer(run, config)
        if tokenizer is None:
            return {}
        return tokenizer.export(place, config.model.context)

    return export_hf(run.checkpoints, step, out, config=config.model, companions=companions)


def _tokenizer(run: RunDirectory, config: RunConfig) -> Tokenizer | None:
    """The tokenizer of a run's data; None for bytes, and where the data is out of reach or has become other data."""
    place = next(iter(config.data.places("train").values()))  # All sources of a mixture have one tokenizer.
    try:
        index = open_index(place, config.streaming)
        if index.fingerprint not in pins(run.recipe()["data"], "train"):
            raise UserError("the shards are not those that the run was trained on", place)
        tokenizer = index.load_tokenizer()
    except UserError as error:
        logger.warning("the tokenizer is not exported: %s", error.what)
        return None
    return None if tokenizer.definition() is None else tokenizer
