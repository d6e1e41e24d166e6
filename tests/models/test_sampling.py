"""Sampling: greedy, top-k, seeds, a text longer than the context."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bigtrain.models.sampling import generate

MakeDecoder = Callable[..., nn.Module]
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_temperature_zero_takes_the_most_probable_token(make_decoder: MakeDecoder) -> None:
    model = make_decoder("llama")
    text = generate(model, PROMPT, 5, temperature=0)
    logits = model.logits({"tokens": text})
    assert torch.equal(text[:, :3], PROMPT)
    assert torch.equal(text[:, 3:], logits[:, 2:-1].argmax(-1))


def test_top_one_is_greedy_and_a_seed_gives_one_text(make_decoder: MakeDecoder) -> None:
    model = make_decoder("gpt2", dropout=0.5)
    assert torch.equal(generate(model, PROMPT, 4, top_k=1), generate(model, PROMPT, 4, temperature=0))
    texts = [generate(model, PROMPT, 8, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert model.training


def test_a_text_longer_than_the_context_goes_on(make_decoder: MakeDecoder) -> None:
    text = generate(make_decoder("gpt2", context=4), PROMPT, 10)
    assert text.shape == (2, 13)


def test_the_padding_of_the_vocabulary_is_never_drawn(make_decoder: MakeDecoder) -> None:
    model = make_decoder("gpt2", vocab_multiple=1024)
    assert generate(model, PROMPT.repeat(20, 1), 8, temperature=10.0).max() < 97


@pytest.mark.parametrize("keys", [{"temperature": -1.0}, {"top_k": 0}])
def test_impossible_settings_are_refused(keys: dict[str, float], make_decoder: MakeDecoder) -> None:
    with pytest.raises(ValueError, match="temperature"):
        generate(make_decoder("gpt2"), PROMPT, 1, **keys)
    with pytest.raises(ValueError, match="shape"):
        generate(make_decoder("gpt2"), PROMPT[:, :0], 1)
