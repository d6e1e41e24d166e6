"""Dropout's bits: the right rate, independent of each other, and a function of nothing but their place."""

from __future__ import annotations

import pytest
import torch

from bigtrain.models.random import dropout, keep_mask

PINNED = ["0001011001110111", "0010011010100111"]
KEYS = torch.tensor([3, 4, 2**62 + 5, -7])
SHAPE = torch.Size((4, 64, 256))
SIGMAS = 5.0


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_values_are_dropped_at_the_given_rate(p: float) -> None:
    dropped = (~keep_mask(SHAPE, p, KEYS, layer=2)).double()
    for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        rates = dropped.mean(dim=dims)
        count = dropped.numel() / rates.numel()
        assert ((rates - p).abs() < SIGMAS * (p * (1 - p) / count) ** 0.5).all()


def test_bits_are_uncorrelated_between_places() -> None:
    signs = keep_mask(SHAPE, 0.5, KEYS, layer=1) * 2.0 - 1
    others = {
        "layer": keep_mask(SHAPE, 0.5, KEYS, layer=2) * 2.0 - 1,
        "step": keep_mask(SHAPE, 0.5, KEYS + 1, layer=1) * 2.0 - 1,
        "sequence": signs.roll(1, 0),
        "position": signs.roll(1, 1),
        "channel": signs.roll(1, 2),
        "far channel": signs.roll(16, 2),
    }
    for name, other in others.items():
        assert (signs * other).mean().abs() < SIGMAS / signs.numel() ** 0.5, name
    across = signs.flatten(0, 1) @ signs.flatten(0, 1).t()
    across.fill_diagonal_(0)
    assert across.abs().max() < 7 * SHAPE[2] ** 0.5


def test_bits_do_not_depend_on_the_split_of_the_batch_or_of_the_activation() -> None:
    whole = keep_mask(SHAPE, 0.3, KEYS, layer=5)
    alone = keep_mask(torch.Size((1, 64, 256)), 0.3, KEYS[2:3], layer=5)
    assert torch.equal(alone[0], whole[2])
    head_and_tail = torch.cat((torch.arange(7, 12), torch.arange(40, 45)))
    part = keep_mask(torch.Size((4, 10, 33)), 0.3, KEYS, 5, positions=head_and_tail)
    assert torch.equal(part, whole[:, head_and_tail, 0:33])


def test_bits_are_pinned() -> None:
    """They are part of a run's identity: another version or device must draw the same."""
    mask = keep_mask(torch.Size((1, 2, 16)), 0.5, torch.tensor([123456789]), layer=3)
    assert ["".join("01"[bit] for bit in row) for row in mask[0].int().tolist()] == PINNED


def test_the_mean_is_kept_and_nothing_is_sampled_in_evaluation() -> None:
    x = torch.ones(SHAPE, dtype=torch.bfloat16)
    kept = dropout(x, 0.1, KEYS, 0, training=True)
    assert kept.dtype == torch.bfloat16
    assert abs(kept.double().mean().item() - 1) < 0.01
    assert dropout(x, 0.1, None, 0, training=False) is x
    assert dropout(x, 0.0, None, 0, training=True) is x


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    dropout(torch.ones(SHAPE), 0.5, KEYS, 0, training=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="keys"):
        dropout(torch.ones(SHAPE), 0.5, None, 0, training=True)
