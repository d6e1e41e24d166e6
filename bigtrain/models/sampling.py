"""Text generation, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from bigtrain.models.contract import Batch, Decoder
from bigtrain.models.decoder import DecoderModel
from bigtrain.models.layers import Attention, Mask, attend

if TYPE_CHECKING:
    from transformers import LogitsProcessorList


class Reader(Protocol):
    """A callable that reads tokens and returns the logits of the next one."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the token after `tokens` (B, T), which start with the tokens of the previous call."""
        ...


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: the rules of transformers, applied in the order of transformers."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Choose only among the k most probable tokens; None: no limit."""
    top_p: float | None = None
    """Choose only among the most probable tokens whose probabilities add up to this (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Choose only among tokens with at least this fraction of the largest probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that the text contains are divided by this, negative ones multiplied (Keskar et al.
    2019)."""

    def __post_init__(self) -> None:
        shares = [share for share in (self.top_p, self.min_p) if share is not None]
        possible = self.temperature >= 0 and (self.top_k is None or self.top_k >= 1) and self.repetition_penalty > 0
        if not possible or not all(0 < share <= 1 for share in shares):
            raise ValueError(
                "temperature must be at least 0, top_k at least 1, top_p and min_p over 0 and at most 1, and "
                "repetition_penalty over 0"
            )

    def processors(self, padding: Tensor | None) -> LogitsProcessorList | None:
        """The logits processors of transformers for these rules; None if the logits stay unchanged.

        Args:
            padding: int64 (B,), number of padding tokens at the start of each sequence.
        """
        if self in (Choice(), Choice(0.0)):
            return None
        from transformers.generation import logits_process as hf

        found: list[Any] = []
        if self.repetition_penalty != 1:
            found.append(hf.RepetitionPenaltyLogitsProcessor(self.repetition_penalty, padding))
        if self.temperature > 0:
            found.append(hf.TemperatureLogitsWarper(float(self.temperature)))
            found += [] if self.top_k is None else [hf.TopKLogitsWarper(self.top_k)]
            found += [] if self.top_p is None else [hf.TopPLogitsWarper(self.top_p)]
            found += [] if self.min_p is None else [hf.MinPLogitsWarper(self.min_p)]
        return hf.LogitsProcessorList(found)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    n: int,
    choice: Choice | None = None,
    *,
    padding: Tensor | None = None,
    ended: Callable[[Tensor], bool] | None = None,
    seed: int = 0,
    given: Batch | None = None,
    cache: bool = True,
) -> Tensor:
    """Append up to n tokens to each sequence.

    Keys and values are cached while the text fits into the model's context. For a longer text, the model reads the
    last `model.context` tokens again for each new token. Random numbers come from a CPU generator private to the call:
    the seed determines the text, and the global generators stay unchanged.

    Args:
        model: A `contract.Decoder`, or a causal model of transformers. Its training mode is restored afterwards.
        tokens: int64 (B, T), the prompts. T may be 0 only if `given` is not empty.
        padding: int64 (B,), number of padding tokens at the start of each sequence; None: 0.
        ended: Called after each new token with all new tokens (B, t); generation stops when it returns True.
        given: Other inputs of the model, such as `images` (B, H, W, channels).
        cache: Whether keys and values are cached, if the model supports it.

    Returns:
        int64 (B, T + n), the prompts and the new tokens; fewer than n new tokens if `ended` stopped the generation.

    Raises:
        ValueError: The prompt is empty, or the model cannot skip padding.
    """
    if tokens.ndim != 2 or (tokens.shape[1] == 0 and not given):
        raise ValueError("generate needs tokens of shape (B, T) with T of at least 1")
    choice = choice or Choice()
    processors = choice.processors(None if padding is None else padding.cpu())
    generator = torch.Generator().manual_seed(seed)
    was_training, length = model.training, tokens.shape[1]
    model.eval()
    try:
        with _reader(model, padding, given, cache) as read:
            for _ in range(n):
                logits = read(tokens).float().cpu()
                if processors is not None:
                    logits = processors(tokens.cpu(), logits)
                if choice.temperature == 0:
                    chosen = logits.argmax(dim=-1, keepdim=True)
                else:
                    chosen = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
                tokens = torch.cat((tokens, chosen.to(tokens.device)), dim=1)
                if ended is not None and ended(tokens[:, length:]):
                    break
    finally:
        model.train(was_training)
    return tokens


def _reader(
    model: nn.Module, padding: Tensor | None, given: Batch | None, cache: bool
) -> AbstractContextManager[Reader]:
    if not hasattr(model, "logits"):
        return _of_transformers(model, padding)
    if isinstance(model, DecoderModel) and cache:
        return _cached(model, padding)
    return _again(cast(Decoder, model), padding, given or {})


@contextmanager
def _again(model: Decoder, padding: Tensor | None, given: Batch) -> Iterator[Reader]:
    """A reader without a cache: it runs the model on the last `context` tokens for each new token."""
    if padding is not None and not isinstance(model, DecoderModel):
        raise ValueError("this model cannot read texts of different lengths in one batch: give them one by one")

    def read(tokens: Tensor) -> Tensor:
        dropped = max(0, tokens.shape[1] - model.context)
        left = None if padding is None else (padding - dropped).clamp(min=0)
        batch = {**given, "tokens": tokens[:, dropped:]}
        if isinstance(model, DecoderModel) and left is not None:
            batch |= _around_padding(model, left, 0, tokens.shape[1] - dropped)
        return model.logits(batch)[:, -1]

    yield read


@contextmanager
def _cached(model: DecoderModel, padding: Tensor | None) -> Iterator[Reader]:
    """A reader that caches the keys and values of the tokens read, while the text fits into the model's context."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend_to_all(layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, causal: bool) -> Tensor:
        if layer in kept:
            key, value = (torch.cat(pair, dim=1) for pair in zip(kept[layer], (key, value), strict=True))
        kept[layer] = key, value
        return attend(query, key, value, mask, causal)

    def use(own: bool) -> None:
        for number, layer in enumerate(layers):
            if own:
                layer.attend = partial(attend_to_all, number)
            else:
                layer.__dict__.pop("attend", None)

    with _again(model, padding, {}) as read_again:

        def read(tokens: Tensor) -> Tensor:
            if tokens.shape[1] > model.context:
                use(False)
                return read_again(tokens)
            known = kept[0][0].shape[1] if kept else 0
            left = torch.zeros_like(tokens[:, 0]) if padding is None else padding
            around = _around_padding(model, left, known, tokens.shape[1])
            return model.logits({"tokens": tokens[:, known:], **around})[:, -1]

        use(True)
        try:
            yield read
        finally:
            use(False)


def _around_padding(model: DecoderModel, padding: Tensor, first: int, end: int) -> Batch:
    """Positions (B, Q) and masks (B, 1, Q, end) of the Q tokens from `first` to `end`.

    A token sees itself and the earlier tokens that are not padding.

    Args:
        padding: int64 (B,), number of padding tokens at the start of each sequence.
    """
    places = torch.arange(end, device=padding.device)
    queries, padding = places[first:], padding[:, None]
    seen = (queries[:, None] >= places) & (places >= padding[:, None])
    # Padding sees itself: attention over no keys gives NaN, and NaN times an attention weight of zero is still NaN.
    seen = seen | (queries[:, None] == places)
    local = seen if model.config.window is None else seen & (queries[:, None] - places < model.config.window)
    positions = (queries - padding).clamp(min=0)
    return {"positions": positions, "mask": seen[:, None], "local_mask": local[:, None]}


@contextmanager
def _of_transformers(model: nn.Module, padding: Tensor | None) -> Iterator[Reader]:
    """A reader of a causal model of transformers, which uses the model's own cache."""
    known, cache = 0, None

    def read(tokens: Tensor) -> Tensor:
        nonlocal known, cache
        places = torch.arange(tokens.shape[1], device=tokens.device)
        left = torch.zeros_like(tokens[:, :1]) if padding is None else padding[:, None]
        output = model(
            input_ids=tokens[:, known:],
            attention_mask=(places >= left).to(torch.int64),
            position_ids=(places[known:] - left).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        known, cache = tokens.shape[1], output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits

    yield read
