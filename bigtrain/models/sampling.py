"""Continuing a text, token by token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bigtrain.models.contract import Batch, Decoder


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    given: Batch | None = None,
) -> Tensor:
    """Append n tokens to each sequence, drawn from the model's distribution.

    The whole text, or its last `model.context` tokens, is read again for each new token. Random numbers come
    from a CPU generator of the call's own, so a seed gives one text and nothing else is disturbed.

    Args:
        model: A `contract.Decoder`; its training mode is put back afterwards.
        tokens: int64 (B, T), T >= 1, or 0 where something else is given.
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Draw from the k most probable tokens only.
        given: What the model is to look at besides, such as `images` (B, H, W, channels).

    Returns:
        int64 (B, T + n): the given tokens and the new ones.

    Raises:
        ValueError: An empty prompt, a negative temperature or a top_k below 1.
    """
    if tokens.ndim != 2 or (tokens.shape[1] == 0 and not given):
        raise ValueError("generate needs tokens of shape (B, T) with T of at least 1")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError("temperature must be at least 0 and top_k at least 1")
    decoder = cast(Decoder, model)
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for _ in range(n):
            logits = decoder.logits({**(given or {}), "tokens": tokens[:, -decoder.context :]})[:, -1].cpu()
            drawn = _draw(logits, temperature, top_k, generator).to(tokens.device)
            tokens = torch.cat((tokens, drawn), dim=1)
    finally:
        model.train(was_training)
    return tokens


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token for each row of logits (B, V): int64 (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
