"""Exports a run's weights in the format of transformers, with the tokenizer of the run's data."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.huggingface import export_hf
from bigtrain.checkpoint.peft import export_peft
from bigtrain.config import UserError
from bigtrain.data.encoding.chat import ends_of_texts
from bigtrain.data.streaming.store import open_index
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.hf_files import CONFIG_NAME, HfFiles, copy_companions, read_object
from bigtrain.run import RunConfig, RunDirectory, load_config
from bigtrain.storage import write_atomic
from bigtrain.training.prepare import pins
from bigtrain.training.weights import Weights

logger = logging.getLogger(__name__)

GENERATION_NAME = "generation_config.json"
"""File in which transformers keeps a model's default settings for sampling."""


def export_run(run: RunDirectory, step: int, out: Path) -> list[Path]:
    """Write a verified checkpoint, of a run or an imported one, as a directory for `from_pretrained`.

    The tokenizer is included if transformers can read it; a byte tokenizer has no such format. If the data cannot be
    reached, the weights are written without a tokenizer, and a warning is logged. If the chat template ends turns with
    another token than the end-of-text token, `eos_token_id` lists both, so that generation stops at either.

    Returns:
        The files written.

    Raises:
        UserError: transformers has no such model, `out` is not empty, or there is no checkpoint of this step.
        CorruptionError: The checkpoint fails verification.
    """
    if not run.exists():
        return _export_imported(Weights.of((run, step)), out)
    config = load_config(run.config)

    def companions(place: Path) -> dict[str, Any]:
        tokenizer = _tokenizer(run, config)
        ends = ends_of_texts(tokenizer) if tokenizer is not None else []
        _copy_generation(config, place, ends)
        if tokenizer is None:
            return {}
        mask = getattr(config.model, "mask", None)
        if config.model.hides_tokens and mask is None:
            mask = tokenizer.vocab_size
        keys: dict[str, Any] = dict(tokenizer.export(place, config.model.context, mask))
        return keys if len(ends) == 1 else {**keys, "eos_token_id": ends}

    return export_hf(run.checkpoints, step, out, config=config.model, companions=companions)


def _export_imported(weights: Weights, out: Path) -> list[Path]:
    """Write the weights of an imported checkpoint, with the tokenizer's files that `checkpoint import` copied."""
    assert weights.step is not None

    def companions(place: Path) -> dict[str, Any]:
        copy_companions(weights.directory, place)
        config = read_object(weights.directory / CONFIG_NAME)
        return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}

    checkpoints = RunDirectory(weights.directory).checkpoints
    return export_hf(checkpoints, weights.step, out, config=weights.config(), companions=companions)


def export_adapters(run: RunDirectory, step: int, out: Path) -> list[Path]:
    """Write the LoRA adapters of a verified checkpoint in the format of peft; see `export_peft`."""
    if not run.exists():
        return export_peft(run.checkpoints, step, out, config=Weights.of((run, step)).config())
    config = load_config(run.config)
    source = getattr(config.model, "hf", None) or config.init.source
    base = source if source is not None and HfFiles.is_one(Path(source)) else None
    return export_peft(run.checkpoints, step, out, config=config.model, base=base)


def _copy_generation(config: RunConfig, place: Path, ends: list[int]) -> None:
    """Copy generation_config.json from the directory of Hugging Face weights from which the run started, if any.

    Args:
        place: The directory to copy to.
        ends: Tokens at which a text ends. If the file lists end tokens, the missing ones are added.
    """
    begun = getattr(config.model, "hf", None) or config.init.source
    if begun is None or not HfFiles.is_one(Path(begun)):
        return
    file = Path(begun) / GENERATION_NAME
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    try:
        settings = dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError("The file holds no JSON object", str(file), "Repair it, or remove it.") from None
    stops = settings.get("eos_token_id")
    known = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if known and (missing := [one for one in ends if one not in known]):
        text = json.dumps({**settings, "eos_token_id": [*known, *missing]}, indent=2) + "\n"
    write_atomic(place / GENERATION_NAME, text)


def _tokenizer(run: RunDirectory, config: RunConfig) -> Tokenizer | None:
    """The tokenizer of a run's data; None for bytes, or if the data cannot be reached or has changed."""
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
