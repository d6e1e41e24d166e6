"""Text from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config import UserError
from bigtrain.data.formats.images import MAX_IMAGE_BYTES, decode_image, image_shape, squared
from bigtrain.data.index import ShardIndex
from bigtrain.data.streaming.store import open_index
from bigtrain.models.batches import batch_kind
from bigtrain.models.sampling import generate
from bigtrain.parallel.mesh import pick_device
from bigtrain.run import RunConfig, RunDirectory, load_config
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
    image: str | Path | None = None,
) -> str:
    """Continue a prompt with the weights of a run's checkpoint.

    Args:
        image: The file of the image whose caption is to be written; scaled and cropped to the model's size.
        step: Of the checkpoint; None: the newest sound one.
        tokens: New tokens; the text ends earlier where the model ends it.

    Returns:
        The prompt and its continuation.

    Raises:
        UserError: No checkpoint, a model that writes no text, an image where there should be none, or none where one
            should be.
    """
    config = load_config(run.config)
    _refuse_other_kinds(config, image is not None, str(run.path))
    if step is None:
        step, _ = commit.newest_verified(run.checkpoints)
    if step is None:
        raise UserError(f"The run '{run.name}' has no checkpoint yet", str(run.path))
    place = next(iter(config.data.places("train").values()))
    index = open_index(place, config.streaming)
    if index.fingerprint not in pins(run.recipe()["data"], "train"):
        raise UserError("The shards are not those that the run was trained on", place)
    tokenizer = index.load_tokenizer()
    ids = [int(id) for id in tokenizer.encode(prompt)]
    if image is not None:
        tokens = max(0, min(tokens, config.model.context - len(ids)))
    elif not ids:
        ids = [tokenizer.eot]
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
    prompt_ids = torch.tensor([ids], device=device, dtype=torch.int64)
    given = None if image is None else {"images": _pixels(Path(image), index).to(device)}
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "seed": seed}
    generated = generate(model, prompt_ids, tokens, given=given, **options)[0].tolist()
    continuation = generated[len(ids) :]
    if tokenizer.eot in continuation:
        continuation = continuation[: continuation.index(tokenizer.eot)]
    return prompt + tokenizer.decode(continuation)


def _refuse_other_kinds(config: RunConfig, has_image: bool, where: str) -> None:
    model = config.model
    kind = batch_kind(model)
    if not kind.of_tokens or not model.keeps_contract:
        raise UserError(f"bigtrain cannot sample from a model of arch '{model.arch}'", where)
    if kind.takes_image != has_image:
        fix = "name one with --image" if kind.takes_image else "leave out --image"
        raise UserError(f"a model of arch '{model.arch}' takes {'an' if kind.takes_image else 'no'} image", fix=fix)


def _pixels(file: Path, index: ShardIndex) -> torch.Tensor:
    """An image as the model was trained on them, uint8 (1, height, width, channels)."""
    info = index.image
    assert info is not None
    if not file.is_file():
        raise UserError(f"no image at '{file}'")
    if file.stat().st_size > MAX_IMAGE_BYTES:
        raise UserError(f"the image has more than {MAX_IMAGE_BYTES} bytes", str(file))
    data = file.read_bytes()
    if image_shape(data, str(file))[:2] != (info.height, info.width) and info.height == info.width:
        data = squared(data, info.height, str(file))
    return torch.from_numpy(decode_image(data, info, str(file)))[None]
