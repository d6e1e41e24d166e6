"""Sampling: greedy, top-k, seeds, caches, a text longer than the context; as transformers samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from bigtrain.models.config import FAMILIES
from bigtrain.models.sampling import Choice, generate
from tests.models.tiny_hf import from_hf

MakeDecoder = Callable[..., nn.Module]
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_temperature_zero_takes_the_most_probable_token(make_decoder: MakeDecoder) -> None:
    model = make_decoder("llama")
    text = generate(model, PROMPT, 5, Choice(0))
    logits = model.logits({"tokens": text})
    assert torch.equal(text[:, :3], PROMPT)
    assert torch.equal(text[:, 3:], logits[:, 2:-1].argmax(-1))


def test_top_one_is_greedy_and_a_seed_gives_one_text(make_decoder: MakeDecoder) -> None:
    model = make_decoder("gpt2", dropout=0.5)
    assert torch.equal(generate(model, PROMPT, 4, Choice(top_k=1)), generate(model, PROMPT, 4, Choice(0)))
    texts = [generate(model, PROMPT, 8, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert model.training


def test_a_text_longer_than_the_context_goes_on(make_decoder: MakeDecoder) -> None:
    text = generate(make_decoder("gpt2", context=4), PROMPT, 10)
    assert text.shape == (2, 13)


def test_the_padding_of_the_vocabulary_is_never_sampled(make_decoder: MakeDecoder) -> None:
    model = make_decoder("gpt2", vocab_multiple=1024)
    assert generate(model, PROMPT.repeat(20, 1), 8, Choice(10.0)).max() < 97


@pytest.mark.parametrize("keys", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 1.5}])
def test_impossible_settings_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="temperature"):
        Choice(**keys)


def test_an_empty_prompt_is_refused(make_decoder: MakeDecoder) -> None:
    with pytest.raises(ValueError, match="shape"):
        generate(make_decoder("gpt2"), PROMPT[:, :0], 1)


SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 97}
ROOM = {"max_position_embeddings": 64}
MODELS = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=64, vocab_size=97),
    "mistral": lambda: transformers.MistralConfig(
        **SHAPE, **ROOM, intermediate_size=48, num_key_value_heads=2, sliding_window=5
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, **ROOM, intermediate_size=48, num_key_value_heads=2, sliding_window=5, head_dim=16, pad_token_id=None,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """One of our models and transformers' of the same weights."""
    torch.manual_seed(2)
    hf_model = transformers.AutoModelForCausalLM.from_config(MODELS[request.param]()).eval()
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    config = FAMILIES[hf_model.config.model_type](
        **FAMILIES[hf_model.config.model_type].from_hf_config(hf_model.config.to_dict())
    )
    model = config.build(97)
    model.load_state_dict(from_hf(config.hf_names(), hf_model.state_dict()))
    return model, hf_model


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_texts_of_a_batch_equal_those_of_transformers(pair: tuple[nn.Module, nn.Module], penalty: float) -> None:
    """Prompts of several lengths, padded on the left, with each of the three ways to read them."""
    native, hf_model = pair
    padding = torch.tensor([0, 6, 3])
    tokens = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    tokens[torch.arange(9) < padding[:, None]] = 0
    expected = hf_model.generate(
        tokens, attention_mask=(torch.arange(9) >= padding[:, None]).long(), max_new_tokens=12, do_sample=False,
        repetition_penalty=penalty, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    choice = Choice(0, repetition_penalty=penalty)
    for model, cache in ((native, True), (native, False), (hf_model, True)):
        assert torch.equal(generate(model, tokens, 12, choice, padding=padding, cache=cache), expected)


def test_a_cache_changes_no_text_that_outgrows_the_context(make_decoder: MakeDecoder) -> None:
    model = make_decoder("llama", sliding_window=6)
    texts = [generate(model, PROMPT, 30, Choice(top_p=0.9), cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)
    assert all("attend" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("keys", [{"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 4}, {"top_k": 9, "top_p": 0.8}])
def test_no_token_is_chosen_that_the_rules_exclude(keys: dict[str, float], make_decoder: MakeDecoder) -> None:
    model = make_decoder("llama")
    with torch.no_grad():
        model.head.weight.mul_(12)
    shares = model.logits({"tokens": PROMPT[:1]})[0, -1].softmax(-1)
    ordered, places = shares.sort(descending=True)
    allowed = torch.ones(97, dtype=torch.bool)
    if "top_k" in keys:
        allowed &= torch.arange(97) < keys["top_k"]
    if "min_p" in keys:
        allowed &= ordered >= keys["min_p"] * ordered[0]
    if "top_p" in keys:
        left = ordered * allowed / (ordered * allowed).sum()
        allowed &= left.cumsum(0) - left < keys["top_p"]
    expected = set(places[allowed].tolist())
    assert 1 < len(expected) < 97
    found = generate(model, PROMPT[:1].repeat(4000, 1), 1, Choice(**keys))[:, -1]
    assert set(found.tolist()) <= expected
    assert len(set(found.tolist())) > 0.6 * len(expected)


def test_a_text_ends_at_the_callers_condition(make_decoder: MakeDecoder) -> None:
    text = generate(make_decoder("llama"), PROMPT, 10, ended=lambda new: new.shape[1] == 4)
    assert text.shape == (2, 7)
