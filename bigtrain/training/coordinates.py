"""Measures the activations of a run's decoder at several widths over its first steps, for a coordinate check.

Yang et al. 2022 (Tensor Programs V), appendix D.1. One process trains on the CPU, in FP32, with the optimizer's
learning rate from the first step on. Activations are measured on the same sequences before the first step and after
each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.data.loader import Loader
from bigtrain.engines.clipping import scale_and_clip, square_of
from bigtrain.engines.rank import reseed, to_device
from bigtrain.models.batches import Arrays, batch_kind
from bigtrain.models.config import FAMILIES, ModelConfig
from bigtrain.models.decoder import DecoderModel
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.models.init import initialise
from bigtrain.run import RunConfig
from bigtrain.training.prepare import prepare

Keep = Literal["head_width", "heads"]
Activations = dict[str, Tensor]
"""Activations by place: embedding, layers.N.attention, layers.N.mlp, logits."""


def measure_coordinates(
    config: RunConfig,
    widths: Sequence[int],
    steps: int,
    *,
    keep: Keep = "head_width",
    random_tokens: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train the config's model at each width for some steps, with batches of `batch.size`.

    Args:
        keep: The quantity that stays constant in wider models: the width of a head, or the number of heads.
        random_tokens: If given, train on uniformly random tokens of a vocabulary of this size, instead of the config's
            data.
        say: Called with a line of text before each width.

    Returns:
        Plain values: `widths`, `steps`, `data`, `lr`, `model` and `places`; `losses`, for each width by step; and by
        place, `size`, the mean |activation|, and `change`, the mean |activation - activation before the first step|.
        The last two are for each width a list by number of steps done, from 0.

    Raises:
        UserError: The model is not a decoder or has an adapter, a width does not allow a whole number of heads, muP is
            not valid for the optimizer, or the data does not fit the config.
    """
    model = config.model
    if not isinstance(model, DecoderConfig) or model.adapter is not None:
        raise UserError(
            f"A coordinate check needs a decoder without an adapter, but this is arch '{model.arch}'"
            + (" with an adapter" if isinstance(model, DecoderConfig) else ""),
            "model.arch",
            "Choose a config with arch llama, gpt2 or another decoder, without model.adapter.",
        )
    shapes = [at_width(model, width, keep) for width in widths]
    if model.follows_mup:
        config.optimizer.check_mup()
    batches, vocab_size, data = _batches(config, steps, random_tokens)
    found: dict[str, Any] = {"size": {}, "change": {}, "losses": []}
    for shape in shapes:
        say(f"width {shape.width}")
        losses, looks = _train(config, shape, vocab_size, batches)
        found["losses"].append(losses)
        for place in looks[0]:
            for kind, start in (("size", None), ("change", looks[0][place])):
                values = [_mean(look[place], start) for look in looks]
                found[kind].setdefault(place, []).append(values)
    kind = f"muP from width {model.mup.base_width}" if model.mup is not None else "standard parametrization"
    facts = {"widths": [shape.width for shape in shapes], "steps": steps, "data": data, "lr": config.optimizer.lr}
    return {**facts, "model": f"{model.arch} of {model.layers} layers, {kind}", "places": list(found["size"]), **found}


def at_width(model: DecoderConfig, width: int, keep: Keep) -> DecoderConfig:
    """A decoder of the same shape at another width: the MLP, and the number or the width of heads, grow in proportion.

    Raises:
        UserError: The width does not allow a whole number of heads, or of channels of a head. The error names possible
            widths.
    """
    share = model.key_value_heads if keep == "head_width" else model.width_of_head
    unit = model.width // math.gcd(model.width, share)
    if keep == "heads" and share * unit // model.width % 2 and model.positions == "rotary":
        unit *= 2
    if width % unit:
        raise UserError(
            f"A model of width {width} cannot keep {'heads of ' if keep == 'head_width' else ''}"
            + (f"width {model.width_of_head}" if keep == "head_width" else f"its {model.heads} heads"),
            "--widths",
            f"Give multiples of {unit}, or change model.heads.",
        )
    keys: dict[str, Any] = {"width": width, "mlp_width": max(1, round(model.hidden_width * width / model.width))}
    if keep == "head_width":
        heads, kv_heads = (count * width // model.width for count in (model.heads, model.key_value_heads))
        keys |= {"heads": heads, "kv_heads": kv_heads, "head_width": model.width_of_head}
    else:
        keys["head_width"] = model.width_of_head * width // model.width
    return cast(DecoderConfig, FAMILIES.read({**model.plain(), **keys}))


def _batches(config: RunConfig, steps: int, random_tokens: int | None) -> tuple[list[Arrays], int, str]:
    """The global batches of the first steps, the size of the vocabulary, and a description of the data."""
    if random_tokens is not None:
        model: ModelConfig = config.model
        count = config.batch.size.sequences(model.context)
        random = np.random.default_rng(abs(config.seed))
        made = [batch_kind(model).example_batch(model, random_tokens, count, random) for _ in range(steps)]
        return made, random_tokens, f"{count} sequences of {model.context} random tokens of {random_tokens}"
    prepared = prepare(config, verify=False)
    count, context = prepared.batch_sequences, prepared.context
    options: dict[str, Any] = {"batch_size": count, "context": context, "seed": config.seed}
    options |= {"document_mask": config.data.document_mask, "streaming": config.streaming}
    with Loader(prepared.sources, prepared.order, **options) as loader:
        read = [loader.batch(step).micro_batches[0] for step in range(steps)]
    return read, prepared.outputs, f"{count} sequences of {context} tokens of data.train"


def _train(
    config: RunConfig, shape: DecoderConfig, vocab_size: int, batches: list[Arrays]
) -> tuple[list[float], list[Activations]]:
    """The loss of each step, in nats, and the activations before the first step and after each step."""
    with torch.device("cpu"):
        model = shape.build(vocab_size)
    initialise(model, config.seed)
    optimizer = config.optimizer.build(model.named_parameters(), lr_scale=shape.lr_scale)
    device, clip = torch.device("cpu"), config.optimizer.clip
    first = to_device(batches[0], device)
    losses, looks = [], [_look(model, first)]
    for step, arrays in enumerate(batches):
        reseed(config.seed, step)
        model.train()
        total, weight, *_ = model(to_device(arrays, device))
        mean = total / weight
        mean.backward()
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        gradients = [one.grad for one in parameters if one.grad is not None]
        scale_and_clip(gradients, torch.ones(()), square_of(gradients, device).sqrt(), clip, parameters)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(float(mean.detach()))
        looks.append(_look(model, first))
    return losses, looks


@torch.no_grad()
def _look(model: DecoderModel, batch: dict[str, Tensor]) -> Activations:
    """The activations of the model on a batch, in evaluation mode."""
    model.eval()
    seen: Activations = {}
    hooks = []
    blocks = model.blocks()
    hooks.append(blocks[0][1].register_forward_pre_hook(lambda _, given: seen.update(embedding=given[0])))
    for name, block in blocks:
        for branch in ("attention", "mlp"):
            place = f"{name}.{branch}"
            hooks.append(getattr(block, branch).register_forward_hook(_keeping(seen, place)))
    seen["logits"] = model.logits(batch)
    for hook in hooks:
        hook.remove()
    return seen


def _keeping(seen: Activations, place: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(module: nn.Module, given: Any, output: Tensor) -> None:
        seen[place] = output

    return keep


def _mean(value: Tensor, start: Tensor | None) -> float:
    return float((value if start is None else value - start).abs().double().mean())
