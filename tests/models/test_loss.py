"""The chunked cross-entropy against the plain one on full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.models.loss import chunked_cross_entropy

SEQUENCES, CONTEXT, WIDTH, VOCAB = 3, 11, 8, 29


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCES, CONTEXT, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (SEQUENCES, CONTEXT), generator=generator)
    weights = torch.rand(SEQUENCES, CONTEXT, generator=generator)
    weights[0, :4] = 0
    weights[2] = 0
    return hidden, weight, targets, weights


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).t()).to(torch.promote_types(hidden.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 11, 33, 1000])
def test_loss_and_gradients_equal_the_plain_form_in_float64(chunk_tokens: int | None) -> None:
    hidden, weight, targets, weights = inputs(torch.float64)
    expected = plain(hidden, weight, targets, weights)
    gradients = torch.autograd.grad(expected * 0.7, (hidden, weight))
    loss, _ = chunked_cross_entropy(hidden, weight, targets, weights, chunk_tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, wanted in zip(torch.autograd.grad(loss * 0.7, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_bf16_hidden_gives_an_fp32_loss_near_the_plain_form(chunk_tokens: int) -> None:
    hidden, weight, targets, weights = inputs(torch.bfloat16)
    weight = weight.detach().float().requires_grad_()
    expected = plain(hidden, weight, targets, weights)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    loss, _ = chunked_cross_entropy(hidden, weight, targets, weights, chunk_tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), gradients, strict=True):
        assert found.dtype == wanted.dtype
        # A gradient of a logit is rounded to BF16 (2^-9) before and after its product.
        assert (found - wanted).float().norm() <= 2**-7 * wanted.float().norm()


def test_nothing_but_the_loss_is_computed_without_gradients() -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    expected, _ = chunked_cross_entropy(hidden, weight, targets, weights, 7)
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(hidden, weight, targets, weights, 7)
    assert loss == expected
    assert not loss.requires_grad


def test_a_token_of_weight_zero_sends_no_gradient() -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    chunked_cross_entropy(hidden, weight, targets, weights)[0].backward()
    assert hidden.grad is not None
    assert (hidden.grad[2] == 0).all()
    assert (hidden.grad[1] != 0).any()


def test_a_frozen_head_still_passes_the_gradient_on() -> None:
    hidden, weight, targets, weights = inputs(torch.float64)
    (expected,) = torch.autograd.grad(plain(hidden, weight, targets, weights), hidden)
    chunked_cross_entropy(hidden, weight.detach(), targets, weights)[0].backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_the_gradients_of_hidden_and_weight_can_be_had_one_after_the_other() -> None:
    """As schedules of pipelines do that put off the gradients of weights."""
    hidden, weight, targets, weights = inputs(torch.float64)
    expected = torch.autograd.grad(plain(hidden, weight, targets, weights), (hidden, weight))
    loss = 3 * chunked_cross_entropy(hidden * 1, weight, targets, weights)[0]
    (of_hidden,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (of_weight,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(of_hidden, 3 * expected[0])
    torch.testing.assert_close(of_weight, 3 * expected[1])


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    loss, _ = chunked_cross_entropy(*inputs(torch.float32))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="each gradient once"):
        loss.backward()
