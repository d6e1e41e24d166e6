"""Text from a trained run."""

from __future__ import annotations

import torch

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config import UserError
from bigtrain.data.streaming import open_index
from bigtrain.models.sampling import generate
from bigtrain.parallel.mesh import pick_device
from bigtrain.plugin import Plugin
from bigtrain.run import RunDirectory, load_config
from bigtrain.training.prepare import pins


def sample(
    run: RunDirectory,
    prompt: str,
    *,
    step: int | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    plugin: Plugin | None = None,
) -> str:
    """Continue a prompt with the weights of a run's checkpoint.

    Args:
        plugin: The user's own model families.
        step: Of the checkpoint; None: the newest sound one.
        tokens: New tokens; the text ends earlier where the model ends it.

    Returns:
        The prompt and its continuation.

    Raises:
        UserError: No checkpoint, a model that writes no text, or a prompt without tokens.
    """
    config = load_config(run.config, plugin=plugin)
    if config.model.data_kind != "tokens" or not config.model.keeps_contract:
        raise UserError(f"bigtrain cannot sample from a model of arch '{config.model.arch}'", str(run.path))
    if step is None:
        step, _ = commit.newest_verified(run.checkpoints)
    if step is None:
        raise UserError(f"The run '{run.name}' has no checkpoint yet", str(run.path))
    place = next(iter(config.data.places("train").values()))
    index = open_index(place, config.streaming)
    if index.fingerprint not in pins(run.what()["data"], "train"):
        raise UserError("The shards are not those that the run was trained on", place)
    tokenizer = index.load_tokenizer()
    ids = [int(id) for id in tokenizer.encode(prompt)] or [tokenizer.eot]
    device = pick_device(0)
    model = config.model.build(index.vocab_size)
    if not callable(getattr(model, "logits", None)):
        raise UserError(
            f"A model of arch '{config.model.arch}' has no logits(batch), from which a text could be continued",
            str(run.path),
            "Give the module one: FP32 logits (B, C, vocabulary) for a batch of tokens alone.",
        )
    model.load_state_dict(read_tensors(run.checkpoints, step), strict=False)
    model.to(device)
    prompt_ids = torch.tensor([ids], device=device)
    generated = generate(model, prompt_ids, tokens, temperature=temperature, top_k=top_k, seed=seed)[0].tolist()
    continuation = generated[len(ids) :]
    if tokenizer.eot in continuation:
        continuation = continuation[: continuation.index(tokenizer.eot)]
    return prompt + tokenizer.decode(continuation)
